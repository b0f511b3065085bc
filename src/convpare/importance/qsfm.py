"""QSFM: channels whose feature maps resemble others are redundant (arXiv 2105.06052).

The paper's own choices of tap, window, data range and tie-break are not public; each is an option here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.graph.structure import Group
from convpare.importance.registry import Context, Ranking, criterion
from convpare.redundancy.similarity import DataRange, SimilarityAccumulator, SimilarityOptions, removal_order
from convpare.redundancy.taps import Tap, taps_of, visit


@dataclass(frozen=True)
class QSFMOptions:
    """The open choices of QSFM.

    Attributes:
        tap: "activation" (what the readers of a channel see, after normalisation and nonlinearity) or "conv".
        window: SSIM over "global" statistics of a map, or a "gaussian" 11×11 window where it fits.
        data_range: dynamic range of the maps: of the whole "layer", of each "image", or a number.
        rule: "pair" (drop one of the most similar pair, again and again), or rank by "mean" or "max" similarity.
        who: of a pair goes the one more similar to the "total" rest, or the one with the smaller "norm" of its maps.
    """

    tap: str = "activation"
    window: str = "global"
    data_range: str | float = "layer"
    rule: str = "pair"
    who: str = "total"

    def __post_init__(self) -> None:
        SimilarityOptions(window=self.window, data_range=self.data_range)  # those who take them check them
        removal_order(torch.eye(2), rule=self.rule, who=self.who, norms=torch.ones(2) if self.who == "norm" else None)

    @staticmethod
    def of(options: Mapping[str, Any]) -> "QSFMOptions":
        """From a criterion's options; others than these are an error."""
        known = {field.name for field in fields(QSFMOptions)}
        if unknown := set(options) - known:
            listed = ", ".join(sorted(known))
            raise ConvpareError(f"QSFM has no option {sorted(unknown)[0]!r}; its options are {listed}")
        return QSFMOptions(**options)


@criterion("qsfm-ssim", needs_images=True, allocation="uniform")
def qsfm_ssim(context: Context) -> dict[str, Ranking]:
    """Structural similarity (SSIM) between feature maps; error 1 − SSIM."""
    return _qsfm(context, "ssim")


@criterion("qsfm-psnr", needs_images=True, allocation="uniform")
def qsfm_psnr(context: Context) -> dict[str, Ranking]:
    """Peak signal-to-noise ratio (PSNR) between feature maps; error 10^(−PSNR/10), the relative squared error."""
    return _qsfm(context, "psnr")


def _qsfm(context: Context, measure: str) -> dict[str, Ranking]:
    if context.images is None:
        raise ConvpareError(f"qsfm-{measure} compares feature maps and needs images: give data")
    options = QSFMOptions.of(context.options)
    taps = [t for g in context.groups for t in taps_of(context.graph, g, options.tap)]
    matrices = _similarities(context, taps, measure, options)
    norms = _norms(context, taps) if options.who == "norm" else None
    rankings = {}
    for group in context.groups:
        mine = [i for i, t in enumerate(taps) if t.group == group.name]
        similarity = torch.stack([matrices[i] for i in mine]).mean(0)
        norm = None if norms is None else torch.stack([norms[i] for i in mine]).mean(0)
        rankings[group.name] = _ranking(context, group, similarity, norm, measure, options)
    return rankings


def _similarities(context: Context, taps: list[Tap], measure: str, options: QSFMOptions) -> list[Tensor]:
    """The mean similarity matrix (channels, channels) at every tap: two passes where the range is the layer's."""
    assert context.images is not None
    spans: list[str | float] = [options.data_range] * len(taps)
    if options.data_range == "layer":
        ranges = [DataRange() for _ in taps]
        visit(context.model, context.graph, taps, context.images, lambda i, maps: ranges[i].update(maps))
        spans = [r.result() for r in ranges]
    sums = [SimilarityAccumulator(SimilarityOptions(measure, options.window, span)) for span in spans]
    visit(context.model, context.graph, taps, context.images, lambda i, maps: sums[i].update(maps))
    return [s.result().cpu() for s in sums]


def _norms(context: Context, taps: list[Tap]) -> list[Tensor]:
    """The summed square of every channel's maps at every tap, shape (channels,)."""
    assert context.images is not None
    sums = [torch.zeros(len(t.channels), dtype=torch.float64) for t in taps]

    def add(i: int, maps: Tensor) -> None:
        sums[i] += maps.double().square().sum([a for a in range(maps.ndim) if a != 1]).cpu()

    visit(context.model, context.graph, taps, context.images, add)
    return sums


def _ranking(
    context: Context, group: Group, similarity: Tensor, norm: Tensor | None, measure: str, options: QSFMOptions
) -> Ranking:
    """Those that are gone already first, then by similarity; the last channel of a group has the largest error."""
    alive = np.flatnonzero(context.alive[group.units])
    gone = np.flatnonzero(~context.alive[group.units])
    index = torch.from_numpy(alive)
    order, scores = removal_order(
        similarity[index][:, index],
        rule=options.rule,
        who=options.who,
        norms=None if norm is None else norm[index],
    )
    worst = -1.0 if measure == "ssim" else min(0.0, float(similarity.min()))
    scores = scores.nan_to_num(neginf=worst)
    errors = (1 - scores).clamp_min(0) if measure == "ssim" else 10 ** (-scores / 10)
    return Ranking(
        np.concatenate([gone, alive[order.cpu().numpy()]]),
        np.concatenate([np.zeros(len(gone)), errors.cpu().numpy()]),
    )
