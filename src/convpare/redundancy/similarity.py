"""How similar the feature maps of a layer's channels are, and the order in which similar channels can go.

Source: QSFM, Wang et al., IEEE Internet of Things Journal 9(23), 2022 (arXiv 2105.06052), which ranks channels by the
SSIM or the PSNR between their feature maps. SSIM is Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004, eq. 13.
The paper leaves the window, the data range and the member of a pair that goes unsaid here: they are options.

SSIM and PSNR see maps only relative to the data range D, so maps are divided by D first and D is 1 from there on.
Everything is computed in float64, and in float32 on a device without it (mps).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from convpare.errors import ConvpareError

PSNR_MAX = 100.0  # dB; the PSNR of identical maps would be infinite
WINDOW_SIZE = 11
_WINDOW_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2  # for data range 1
_PAIRS_PER_BLOCK = 2**16


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConvpareError(f"{name} is {value!r}; give one of {', '.join(map(repr, choices))}.")


@dataclass(frozen=True)
class SimilarityOptions:
    """What :func:`similarity_matrix` computes.

    measure: ``"ssim"`` (in [-1, 1], 1 = identical) or ``"psnr"`` (in dB, at most ``PSNR_MAX`` = 100 dB = identical).
    window: for SSIM. ``"global"``: mean, variance and covariance (population) over the whole map. ``"gaussian"``: SSIM
        in an 11x11 Gaussian window (sigma 1.5), averaged over the positions where the window lies inside the map;
        maps that are not 2-D, or are smaller than the window, use global statistics.
    data_range: D. ``"layer"``: max - min over all maps given; ``"image"``: max - min over the channels of each image;
        a number (the unit of the maps): as given. 0 is for a layer whose maps are all one constant (see
        :class:`DataRange`), and an error for other maps.
    memory_limit: bytes for temporaries, beside the maps and the result. It is exceeded where one image alone needs
        more: up to ``24 C (P + C)`` bytes for C channels of P positions, ``80 C P`` with the Gaussian window.

    Raises ConvpareError for any other value.
    """

    measure: str = "ssim"
    window: str = "global"
    data_range: str | float = "layer"
    memory_limit: int = 2**26

    def __post_init__(self) -> None:
        _check_choice("measure", self.measure, ("ssim", "psnr"))
        _check_choice("window", self.window, ("global", "gaussian"))
        if isinstance(self.data_range, str):
            _check_choice("data_range", self.data_range, ("layer", "image"))
        elif not 0 <= self.data_range < inf:
            raise ConvpareError(f"data_range is {self.data_range}; give a finite number >= 0, 'layer' or 'image'.")
        if self.memory_limit < 1:
            raise ConvpareError(f"memory_limit is {self.memory_limit}; give a positive number of bytes.")


_DEFAULTS = SimilarityOptions()


class RemovalOrder(NamedTuple):
    """Channels in the order they should go, and the similarity at which each goes.

    order: (C,) int64. scores: (C,) in the dtype of the similarity matrix, non-increasing; ``-inf`` for a channel that
    no other is left to be similar to.
    """

    order: Tensor
    scores: Tensor


def similarity_matrix(maps: Tensor, options: SimilarityOptions = _DEFAULTS) -> Tensor:
    """Similarity of every pair of channels, averaged over images.

    maps: (n, C, \\*spatial), real, of any spatial order, none included; images count equally.
    Returns (C, C) float64 on the device of ``maps`` (float32 on mps), symmetric, with diagonal 1 (SSIM) or 100 (PSNR).

    SSIM(x, y) = (2 mx my + C1)(2 sxy + C2) / ((mx² + my² + C1)(sx² + sy² + C2)), C1 = (0.01 D)², C2 = (0.03 D)².
    PSNR(x, y) = 10 log10(D² / MSE(x, y)), clamped at 100 dB. The mean over images is the mean of dB.

    Maps without variance (constant maps, maps of one position) have between them the first factor of SSIM only.
    Dead (all-zero) maps and other equal maps have SSIM 1 and PSNR 100. That includes D = 0, all maps one constant.

    The Gaussian window is ``skimage.metrics.structural_similarity(gaussian_weights=True, use_sample_covariance=False,
    data_range=D)``. torchmetrics computes the same at these positions but averages over a reflected border, too.

    MSE comes from a Gram matrix of centred maps, with an error of about 1e-16 D². So for maps up to 10⁶ D in magnitude,
    PSNR is good to 1e-7 dB below 50 dB and to 1e-5 dB up to 100 dB. In float32 it is good to 1e-4 dB below 60 dB and
    unreliable above, for maps up to D in magnitude.

    Raises ConvpareError for maps that are empty, complex, without a channel axis, or not finite.
    """
    if options.data_range == "layer":
        data_range = DataRange()
        data_range.update(maps)
        options = replace(options, data_range=data_range.result())
    accumulator = SimilarityAccumulator(options)
    accumulator.update(maps)
    return accumulator.result()


class DataRange:
    """Max - min over all batches of a layer's maps: the first of two passes when a layer does not fit in memory."""

    def __init__(self) -> None:
        self._low, self._high = inf, -inf

    def update(self, maps: Tensor) -> None:
        """Take in maps (n, C, \\*spatial). Raises ConvpareError as :func:`similarity_matrix` does."""
        low, high = _extent(maps)
        self._low, self._high = min(self._low, low), max(self._high, high)

    def result(self) -> float:
        """The data range so far, in the unit of the maps. Raises ConvpareError before the first update."""
        if self._low > self._high:
            raise ConvpareError("DataRange has seen no maps; call update(maps) before result().")
        return self._high - self._low


class SimilarityAccumulator:
    """:func:`similarity_matrix` over batches. The result does not depend on how the images are split.

    ``data_range="layer"`` needs every map before the first similarity, so it is refused with ConvpareError: measure it
    with :class:`DataRange` in a pass before, and give the number.
    """

    def __init__(self, options: SimilarityOptions) -> None:
        if options.data_range == "layer":
            raise ConvpareError(
                "SimilarityAccumulator got data_range='layer', which is known only after the last batch; "
                "measure it with DataRange first and give the number, or use 'image'."
            )
        self._options = options
        self._sum: Tensor | None = None
        self._images = 0

    def update(self, maps: Tensor) -> None:
        """Take in maps (n, C, \\*spatial); n and spatial may differ between calls, C not.

        Raises ConvpareError as :func:`similarity_matrix` does, and for another C or a range of 0 where maps differ.
        """
        low, high = _extent(maps)
        if self._options.data_range == 0 and high > low:
            raise ConvpareError(f"data_range is 0 but the maps span {high - low:g}; give their range.")
        images, channels = maps.shape[:2]
        if self._sum is not None and channels != len(self._sum):
            raise ConvpareError(f"Maps have {channels} channels, those before had {len(self._sum)}; give one layer.")
        total = torch.zeros(channels, channels, dtype=_working_dtype(maps.device), device=maps.device)
        for chunk in torch.split(maps.detach(), _images_per_chunk(maps, self._options)):
            total += _pairwise_sum(_scaled(chunk, self._options.data_range), self._options)
        self._sum = total if self._sum is None else self._sum + total
        self._images += images

    def result(self) -> Tensor:
        """(C, C) mean over all images so far. Raises ConvpareError before the first update."""
        if self._sum is None:
            raise ConvpareError("SimilarityAccumulator has seen no maps; call update(maps) before result().")
        mean = self._sum / self._images
        mean = (mean + mean.T) / 2  # matrix products are symmetric only up to rounding
        if self._options.measure == "psnr":
            return mean.clamp_(max=PSNR_MAX).fill_diagonal_(PSNR_MAX)
        return mean.clamp_(-1, 1).fill_diagonal_(1)


def removal_order(
    similarity: Tensor, *, rule: str = "pair", who: str = "total", norms: Tensor | None = None
) -> RemovalOrder:
    """The order in which channels should go, most redundant first.

    similarity: (C, C), symmetric, finite; larger is more similar. The diagonal is not used.
    rule: ``"pair"``: again and again, of the most similar pair left, one member goes. ``"mean"`` / ``"max"``: channels
        go by their mean / largest similarity to all others, at once; so with ``"max"`` *both* of a pair of twins go
        early.
    who: which of a pair goes. ``"total"``: the one with the larger total similarity to the channels left;
        ``"norm"``: the one with the smaller ``norms``.
    norms: (C,), finite, such as filter L1 norms or absolute batch-norm scales; only for, and needed by,
        ``who="norm"``.
    Ties: the first pair (in row-major order) comes first; of two equal channels the later goes first.

    Returns all C channels: a prefix is what a budget removes. ``"pair"`` sorts the pairs once, for a pair of channels
    that are both left keeps its similarity: O(C² log C) time, O(C²) memory.

    Raises ConvpareError for any other option, a matrix that is not square, symmetric and finite, or unusable norms.
    """
    _check_choice("rule", rule, ("pair", "mean", "max"))
    _check_choice("who", who, ("total", "norm"))
    if (who == "norm") != (norms is not None) or (who == "norm" and rule != "pair"):
        raise ConvpareError("Give norms together with who='norm' and rule='pair', and not otherwise.")
    matrix = _checked_similarity(similarity).fill_diagonal_(0)
    if norms is not None:
        norms = _checked_norms(norms, len(matrix))
    order, scores = _pair_order(matrix, norms) if rule == "pair" else _score_order(matrix, rule)
    return RemovalOrder(order.to(similarity.device), scores.to(similarity))


def _pair_order(matrix: Tensor, norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Walk the pairs from the most similar on: the first with both members left is the most similar pair left."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    ranked = matrix[rows, columns].argsort(descending=True, stable=True)
    left = dict.fromkeys(range(len(matrix)))
    is_left = matrix.new_ones(len(matrix))
    order, scores = [], []
    for block in torch.split(ranked, _PAIRS_PER_BLOCK):  # blocks, as Python integers take far more memory than tensors
        for i, j in zip(rows[block].tolist(), columns[block].tolist(), strict=True):
            if i in left and j in left:
                expendable_i, expendable_j = matrix[[i, j]] @ is_left if norms is None else -norms[[i, j]]
                gone = i if expendable_i > expendable_j else j
                del left[gone]
                is_left[gone] = 0
                order.append(gone)
                scores.append(float(matrix[i, j]))
    return matrix.new_tensor([*order, *left], dtype=torch.int64), matrix.new_tensor([*scores, -inf])


def _score_order(matrix: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    channels = len(matrix)
    if channels == 1:
        return matrix.new_zeros(1, dtype=torch.int64), matrix.new_full((1,), -inf)
    scores = matrix.sum(1) / (channels - 1) if rule == "mean" else matrix.fill_diagonal_(-inf).amax(1)
    order = channels - 1 - scores.flip(0).argsort(descending=True, stable=True)  # flipped, so of equals the later goes
    return order, scores[order]


def _pairwise_sum(maps: Tensor, options: SimilarityOptions) -> Tensor:
    """(C, C) sum over the images of the measure, for maps (n, C, *spatial) of data range 1."""
    if options.measure == "psnr":
        return _psnr_sum(maps)
    return _windowed_ssim_sum(maps) if _is_windowed(maps, options) else _global_ssim_sum(maps)


def _global_ssim_sum(maps: Tensor) -> Tensor:
    mean, covariance = _moments(maps)
    variance = covariance.diagonal(dim1=1, dim2=2).clone()
    x, y = (slice(None), slice(None), None), (slice(None), None)
    return _ssim(mean[x], mean[y], variance[x], variance[y], covariance).sum(0)


def _windowed_ssim_sum(maps: Tensor) -> Tensor:
    """SSIM in a Gaussian window. One row of pairs (i, i...C) at a time: the pairs' products are C/2 times the maps."""
    vertical, horizontal = (_gaussian_band(size, maps) for size in maps.shape[2:])

    def blur(x: Tensor) -> Tensor:
        return vertical @ (x @ horizontal.T)

    offset = maps.mean((2, 3), keepdim=True)
    centred = maps - offset  # leaves the covariances as they are, and keeps their digits
    local = blur(centred)
    mean, variance = local + offset, blur(centred**2) - local**2
    total = maps.new_zeros(maps.shape[1], maps.shape[1])
    for i in range(maps.shape[1]):
        x, y = (slice(None), slice(i, i + 1)), (slice(None), slice(i, None))
        covariance = blur(centred[x] * centred[y]).sub_(local[x] * local[y])
        values = _ssim(mean[x], mean[y], variance[x], variance[y], covariance).mean((2, 3)).sum(0)
        total[i, i:] = total[i:, i] = values
    return total


def _psnr_sum(maps: Tensor) -> Tensor:
    mean, covariance = _moments(maps - maps.mean(1, keepdim=True))  # differences stay, and less of them is cancelled
    variance = covariance.diagonal(dim1=1, dim2=2).clone()
    error = covariance.mul_(-2).add_(variance[:, :, None]).add_(variance[:, None])
    error.add_((mean[:, :, None] - mean[:, None]).square_())
    return error.clamp_(min=10 ** (-PSNR_MAX / 10)).log10_().mul_(-10).sum(0)


def _ssim(mean_x: Tensor, mean_y: Tensor, variance_x: Tensor, variance_y: Tensor, covariance: Tensor) -> Tensor:
    """SSIM of broadcast statistics, for data range 1. Overwrites covariance."""
    luminance = (2 * mean_x * mean_y).add_(_C1).div_((mean_x**2 + mean_y**2).add_(_C1))
    structure = covariance.mul_(2).add_(_C2).div_((variance_x + variance_y).add_(_C2))
    return luminance.mul_(structure)


def _moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Means (n, C) and population covariances (n, C, C) over the positions of maps (n, C, *spatial)."""
    maps = maps.reshape(*maps.shape[:2], -1)
    mean = maps.mean(2)
    centred = maps - mean[:, :, None]
    return mean, (centred @ centred.mT).div_(maps.shape[2])


def _gaussian_band(size: int, like: Tensor) -> Tensor:
    """(size - 10, size) matrix that filters an axis where the window fits: faster than a convolution in float64."""
    radius = WINDOW_SIZE // 2
    position = torch.arange(size, dtype=like.dtype, device=like.device)
    offset = position - position[radius : size - radius, None]
    weight = torch.exp(-(offset**2) / (2 * _WINDOW_SIGMA**2)) * (offset.abs() <= radius)
    return weight / weight.sum(1, keepdim=True)


def _scaled(maps: Tensor, data_range: str | float) -> Tensor:
    """Maps over their data range, in the working precision; over 1 where the range is 0: such maps are all equal."""
    maps = maps.to(_working_dtype(maps.device))
    if not isinstance(data_range, str):
        return maps / (data_range or 1.0)
    low, high = maps.flatten(1).aminmax(dim=1)
    span = (high - low).reshape(-1, *[1] * (maps.ndim - 1))
    return maps / torch.where(span > 0, span, 1.0)


def _images_per_chunk(maps: Tensor, options: SimilarityOptions) -> int:
    channels, positions = maps.shape[1], maps[0, 0].numel()
    values = 3 * channels * (positions + channels)
    if _is_windowed(maps, options):
        values = 10 * channels * positions
    return max(1, options.memory_limit // (8 * values))


def _is_windowed(maps: Tensor, options: SimilarityOptions) -> bool:
    fits = maps.ndim == 4 and min(maps.shape[2:]) >= WINDOW_SIZE
    return fits and options.measure == "ssim" and options.window == "gaussian"


def _working_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _extent(maps: Tensor) -> tuple[float, float]:
    """Smallest and largest value of checked maps."""
    if maps.ndim < 2 or maps.numel() == 0 or maps.is_complex():
        raise ConvpareError(f"Maps are {maps.dtype}, {tuple(maps.shape)}; give real, non-empty maps (n, C, *spatial).")
    low, high = (float(value) for value in maps.detach().aminmax())
    if not isfinite(high - low):
        raise ConvpareError(f"Maps run from {low} to {high}; give finite maps.")
    return low, high


def _checked_similarity(similarity: Tensor) -> Tensor:
    """A float64 copy on the CPU, where the many small steps of the pair rule are fastest."""
    shape = tuple(similarity.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0 or not similarity.is_floating_point():
        raise ConvpareError(f"The similarity matrix is {similarity.dtype}, {shape}; give a floating-point (C, C).")
    matrix = similarity.detach().cpu().to(torch.float64, copy=True)
    if not matrix.isfinite().all():
        raise ConvpareError("The similarity matrix has non-finite entries; give similarity_matrix's result.")
    if not torch.allclose(matrix, matrix.T):
        raise ConvpareError("The similarity matrix is not symmetric; give similarity_matrix's result.")
    return matrix


def _checked_norms(norms: Tensor, channels: int) -> Tensor:
    norms = norms.detach().cpu().to(torch.float64)
    if norms.shape != (channels,) or not norms.isfinite().all():
        raise ConvpareError(f"norms have shape {tuple(norms.shape)}; give {channels} finite numbers, one a channel.")
    return norms
