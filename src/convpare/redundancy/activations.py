"""How much of what the channels of a network put out repeats itself, measured on images, for every group of channels.

Similarity of the channels' feature maps: SSIM and PSNR as in QSFM (arXiv 2105.06052, see `similarity`), and Pearson
correlation, which also finds maps that are equal up to a factor. Effective ranks of all channels together: the entropy
based one of Roy and Vetterli (EUSIPCO 2007), the participation ratio and the stable rank.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph.structure import Graph
from convpare.redundancy.similarity import SimilarityAccumulator, SimilarityOptions
from convpare.redundancy.taps import TAPS, Tap, taps_of, visit

NEARLY_DEAD = 1e-6  # of the mean variance of the group's channels
_BATCH = 32
_BYTES_PER_VALUE = 32  # a feature map as it is, and its copies in float64


@dataclass(frozen=True)
class ActivationOptions:
    """What `measure_activations` looks at.

    Attributes:
        tap: "activation" (what the readers of a channel see, after normalisation and nonlinearity) or "conv".
        window: SSIM over "global" statistics of a map, or a "gaussian" 11×11 window where it fits.
        data_range: for SSIM and PSNR, of the whole "layer", of each "image", or a number; see `SimilarityOptions`.
        centred: effective ranks of the channels' covariance; else of their second moment about zero.
        pairs: how many of the most similar pairs are listed, by each measure.
        memory_limit: bytes for feature maps and what is computed from them, and again for the sums over images; one
            image or one tap may need more. The model's own activations, up to 32 images at a time, come on top.

    Raises:
        ConvpareError: a value makes no sense.
    """

    tap: str = "activation"
    window: str = "global"
    data_range: str | float = "layer"
    centred: bool = True
    pairs: int = 10
    memory_limit: int = 2**28

    def __post_init__(self) -> None:
        SimilarityOptions("ssim", self.window, self.data_range, self.memory_limit)
        if self.tap not in TAPS:
            raise ConvpareError(f"no tap {self.tap!r}; choose one of {', '.join(TAPS)}")
        if self.pairs < 0:
            raise ConvpareError(f"pairs is {self.pairs}; expected 0 or more")


_DEFAULTS = ActivationOptions()


class Pair(NamedTuple):
    """Two channels of a group, i < j, and how similar they are."""

    i: int
    j: int
    value: float


@dataclass(frozen=True)
class Ranks:
    """How many directions the channels of a group use.

    Attributes: with λ the eigenvalues of the channels' covariance (or second moment) and p = λ/Σλ,
        effective_rank: exp(-Σ p ln p).
        participation_ratio: 1/Σp² = (Σλ)²/Σλ².
        stable_rank: 1/max p = Σλ/max λ, which is ‖X‖²_F/‖X‖²_2 of the activations X (positions, channels).
        rank_99: how many of the largest λ hold 99 % of Σλ.

    All are 0 where all λ are. Each is a mean over the taps of the group.
    """

    effective_rank: float
    participation_ratio: float
    stable_rank: float
    rank_99: float


@dataclass(frozen=True, eq=False)
class GroupActivations:
    """The redundancy of one group's activations. Where several layers read the group, everything is a mean over these.

    Attributes:
        group: its name.
        channels: how many it has.
        images: how many were looked at.
        taps: the layers at which maps were read.
        ssim, psnr: (channels, channels) float64 on the CPU, mean over images; PSNR in dB, at most 100.
        correlation: the same of |Pearson correlation| over all positions and images; 0 between a constant channel and
            any other, 1 on the diagonal.
        ranks: effective ranks of the activations.
        dead: channels with one value (such as 0) at all positions of all images, at every tap.
        nearly_dead: others whose variance is below 1e-6 of the group's mean variance, at every tap.
        pairs: for "ssim", "psnr" and "correlation" the most similar pairs, best first, without dead channels, all of
            which are alike.
    """

    group: str
    channels: int
    images: int
    taps: tuple[str, ...]
    ssim: Tensor = field(repr=False)
    psnr: Tensor = field(repr=False)
    correlation: Tensor = field(repr=False)
    ranks: Ranks
    dead: tuple[int, ...]
    nearly_dead: tuple[int, ...]
    pairs: Mapping[str, tuple[Pair, ...]]

    def to_json(self) -> dict[str, Any]:
        """All but the matrices."""
        return {
            "group": self.group,
            "channels": self.channels,
            "images": self.images,
            "taps": list(self.taps),
            **asdict(self.ranks),
            "dead": list(self.dead),
            "nearly_dead": list(self.nearly_dead),
            "pairs": {measure: [list(pair) for pair in pairs] for measure, pairs in self.pairs.items()},
        }


def measure_activations(
    model: nn.Module,
    graph: Graph,
    images: Tensor,
    options: ActivationOptions = _DEFAULTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, GroupActivations]:
    """How similar the channels of every group of `graph` are on `images`, by the group's name.

    The model runs over the images once for the extent and the mean of each channel, and once more for the rest; more
    often where the (channels, channels) sums of all groups together exceed the memory limit. Everything is computed in
    float64 (float32 on mps). How images are split into batches changes the last digits only.

    Args:
        images: (n, channels, *spatial), preprocessed.
        on_progress: called with (images run, images to run in all passes) after every batch.

    Raises:
        ConvpareError: there are no images, they do not suit the model, the model takes several inputs, a layer does not
            run as a module, or feature maps are not finite.
    """
    _check(graph, images)
    taps = [tap for group in graph.groups for tap in taps_of(graph, group, options.tap)]
    if not taps:
        return {}
    rounds = _rounds(taps, options.memory_limit)
    with torch.random.fork_rng(devices=[]):
        batch = _batch_size(model, graph, taps, images, options)
        walk = _Walk(model, graph, images.split(batch), (1 + len(rounds)) * len(images), on_progress)
        extents = _extents(walk, taps)
        totals: dict[str, _Findings] = {}
        for part in rounds:
            for tap, found in zip(taps[part], _findings(walk, taps[part], extents[part], options), strict=True):
                totals[tap.group] = totals[tap.group].plus(found) if tap.group in totals else found
    return {group.name: _group(group.name, taps, totals[group.name], len(images), options) for group in graph.groups}


def most_similar_pairs(similarity: Tensor, channels: Tensor, count: int) -> tuple[Pair, ...]:
    """The `count` most similar pairs among `channels` (k,), ascending, of a matrix (channels, channels); best first."""
    i, j = channels[torch.triu_indices(len(channels), len(channels), 1)]
    values = similarity[i, j]
    best = values.argsort(descending=True, stable=True)[:count]
    return tuple(map(Pair, i[best].tolist(), j[best].tolist(), values[best].tolist()))


class _Walk:
    """Runs the model over the images, a number of times in all, and tells how far it is."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        batches: Sequence[Tensor],
        total: int,
        tell: Callable[[int, int], None] | None,
    ) -> None:
        self._model, self._graph, self._batches = model, graph, batches
        self._done, self._total, self._tell = 0, total, tell

    def __call__(self, taps: Sequence[Tap], heard: Callable[[int, Tensor], None]) -> None:
        for batch in self._batches:
            visit(self._model, self._graph, taps, batch, heard)
            self._done += len(batch)
            if self._tell is not None:
                self._tell(self._done, self._total)


class _Extent:
    """Smallest, largest and mean value of each channel at a tap, (channels,) float64."""

    def __init__(self, channels: int) -> None:
        self.low = torch.full((channels,), math.inf, dtype=torch.float64)
        self.high = -self.low
        self._total = torch.zeros(channels, dtype=torch.float64)
        self.count = 0

    def update(self, maps: Tensor) -> None:
        values = _by_channel(maps)
        low, high = (extreme.cpu().double() for extreme in values.aminmax(dim=1))
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._total += values.sum(1, dtype=_working_dtype(values)).cpu()
        self.count += values.shape[1]

    @property
    def mean(self) -> Tensor:
        return self._total / self.count

    @property
    def varies(self) -> Tensor:
        return self.high > self.low

    @property
    def data_range(self) -> float:
        return float(self.high.max() - self.low.min())

    @property
    def magnitude(self) -> float:
        """The largest absolute value, 1 if all are zero."""
        return float(torch.maximum(self.high, -self.low).max()) or 1.0


@dataclass(frozen=True)
class _Findings:
    """What one tap, or the sum over several, has to say."""

    matrices: Tensor  # (3, channels, channels): SSIM, PSNR, |correlation|
    ranks: Tensor  # (4,)
    dead: Tensor  # (channels,) bool
    nearly_dead: Tensor  # (channels,) bool, dead ones included

    def plus(self, other: "_Findings") -> "_Findings":
        return _Findings(
            self.matrices.add_(other.matrices),
            self.ranks + other.ranks,
            self.dead & other.dead,
            self.nearly_dead & other.nearly_dead,
        )


class _Sums:
    """What a tap's maps sum up to over the images, once their extent is known."""

    def __init__(self, extent: _Extent, options: ActivationOptions) -> None:
        self._extent, self._centred = extent, options.centred
        span = extent.data_range if options.data_range == "layer" else options.data_range
        self._ssim, self._psnr = (
            SimilarityAccumulator(SimilarityOptions(measure, options.window, span, options.memory_limit))
            for measure in ("ssim", "psnr")
        )
        self._outer = torch.zeros(())

    def update(self, maps: Tensor) -> None:
        self._ssim.update(maps)
        self._psnr.update(maps)
        values = _by_channel(maps)
        values = values.to(_working_dtype(values))
        values = (values - self._extent.mean.to(values)[:, None]).div_(self._extent.magnitude)
        self._outer = self._outer + values @ values.mT

    def result(self) -> _Findings:
        varies = self._extent.varies
        covariance = self._outer.cpu().double() / self._extent.count * (varies[:, None] & varies)
        variance = covariance.diagonal().clone()
        faint = variance < NEARLY_DEAD * variance.mean()
        correlation = _correlation(covariance)
        if not self._centred:
            mean = self._extent.mean / self._extent.magnitude
            covariance.addr_(mean, mean)
        matrices = torch.stack([self._ssim.result().cpu().double(), self._psnr.result().cpu().double(), correlation])
        return _Findings(matrices, _ranks(covariance), ~varies, faint | ~varies)


def _extents(walk: _Walk, taps: Sequence[Tap]) -> list[_Extent]:
    """The first pass."""
    extents = [_Extent(len(tap.channels)) for tap in taps]
    walk(taps, lambda number, maps: extents[number].update(maps))
    for tap, extent in zip(taps, extents, strict=True):
        _check_finite(tap, extent)
    return extents


def _findings(
    walk: _Walk, taps: Sequence[Tap], extents: Sequence[_Extent], options: ActivationOptions
) -> Iterator[_Findings]:
    """A second pass, and what each tap has to say; its sums are let go then."""
    sums = [_Sums(extent, options) for extent in extents]
    walk(taps, lambda number, maps: sums[number].update(maps))
    while sums:
        yield sums.pop(0).result()


def _correlation(covariance: Tensor) -> Tensor:
    """|Pearson correlation| of a covariance (channels, channels); 0 with a channel without variance."""
    deviation = covariance.diagonal().sqrt().clamp_min(torch.finfo(covariance.dtype).tiny)
    correlation = (covariance / deviation[:, None] / deviation).abs().clamp_max(1)
    return torch.maximum(correlation, correlation.mT).fill_diagonal_(1)


def _ranks(moments: Tensor) -> Tensor:
    """Effective rank, participation ratio, stable rank and rank at 99 % of symmetric moments, in this order, (4,)."""
    values: Tensor = torch.linalg.eigvalsh(moments).flip(0).clamp_min(0)
    if values[0] == 0:
        return values.new_zeros(4)
    share = values / values.sum()
    reached = share.cumsum(0) >= 0.99 * (1 - 1e-12)
    return torch.stack(
        [torch.special.entr(share).sum().exp(), 1 / share.square().sum(), 1 / share[0], (~reached).sum() + 1]
    )


def _group(
    name: str, taps: Sequence[Tap], total: _Findings, images: int, options: ActivationOptions
) -> GroupActivations:
    layers = tuple(tap.layer for tap in taps if tap.group == name)
    matrices = dict(zip(("ssim", "psnr", "correlation"), total.matrices.div_(len(layers)), strict=True))
    alive = (~total.dead).nonzero().squeeze(1)
    return GroupActivations(
        group=name,
        channels=len(total.dead),
        images=images,
        taps=layers,
        **matrices,
        ranks=Ranks(*(total.ranks / len(layers)).tolist()),
        dead=tuple(total.dead.nonzero().squeeze(1).tolist()),
        nearly_dead=tuple((total.nearly_dead & ~total.dead).nonzero().squeeze(1).tolist()),
        pairs={measure: most_similar_pairs(matrix, alive, options.pairs) for measure, matrix in matrices.items()},
    )


def _rounds(taps: Sequence[Tap], memory_limit: int) -> list[slice]:
    """The taps in runs whose three (channels, channels) sums in float64 fit into memory together."""
    starts, room = [0], memory_limit
    for number, tap in enumerate(taps):
        size = 3 * 8 * len(tap.channels) ** 2
        if size > room and number > starts[-1]:
            starts.append(number)
            room = memory_limit
        room -= size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(taps)], strict=True)]


def _batch_size(model: nn.Module, graph: Graph, taps: Sequence[Tap], images: Tensor, options: ActivationOptions) -> int:
    """How many images at a time: as one image shows, whose maps are read on the way."""
    sizes: list[int] = []
    visit(model, graph, taps, images[:1], lambda _, maps: sizes.append(maps.numel()))
    return min(_BATCH, max(1, options.memory_limit // (_BYTES_PER_VALUE * max(sizes))))


def _by_channel(maps: Tensor) -> Tensor:
    """(n, channels, *spatial) → (channels, n · positions)."""
    values: Tensor = maps.transpose(0, 1).flatten(1)
    return values


def _working_dtype(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def _check(graph: Graph, images: Tensor) -> None:
    if images.ndim < 2 or not images.numel():
        raise ConvpareError(f"images have shape {tuple(images.shape)}; expected (n, channels, *spatial), not empty")
    if len(graph.inputs) != 1:
        raise ConvpareError(
            f"{graph.model} takes {len(graph.inputs)} inputs; activations can be measured of a network with one only"
        )


def _check_finite(tap: Tap, extent: _Extent) -> None:
    if not math.isfinite(extent.data_range):
        raise ConvpareError(
            f"the feature maps of group {tap.group!r} at layer {tap.layer!r} hold NaN or infinity; give finite images, "
            "and a model whose activations on them are finite"
        )
