"""Block designs with the ratio K/R as a parameter, on images and on videos.

K is the number of channels that leave a block, R the rank of its kernel along them: the channels that enter the 1x1
convolution which expands to K (arXiv 2112.04857). All designs are one chain, a 1x1 convolution K -> R, a spatial
convolution R -> R and a 1x1 convolution R -> K, each with a batch norm; they differ in what of it is grouped, where it
is rectified, and whether a shortcut goes around:

    kind         spatial     1x1         shortcut   not rectified   after
    bottleneck   dense       dense       yes                        ResNet, arXiv 1512.03385
    separable    depthwise   dense       no                         MobileNetV1, arXiv 1704.04861
    inverted     depthwise   dense       yes        the sum         MobileNetV2, arXiv 1801.04381
    resnext      grouped     dense       yes                        ResNeXt, arXiv 1611.05431
    shufflenet   depthwise   grouped     yes        the spatial     ShuffleNetV1, arXiv 1707.01083

In the terms of the paper the spatial convolution is the core of a Tucker kernel, or, where it is depthwise, that of a
CP kernel. So that the designs differ in nothing else, all rectifiers are ReLU (MobileNetV2 has ReLU6), separable blocks
have the 1x1 convolution to R (MobileNetV1's have none, there K of one block is R of the next), and all shortcuts are
free of parameters: subsampled and filled up with channels of zeros where a stage begins.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError


@dataclass(frozen=True)
class _Kind:
    """What sets a design apart; groups of a convolution: "dense" (one), "grouped" (the design's), "depthwise" (all)."""

    spatial: str
    pointwise: str = "dense"
    shortcut: bool = True
    spatial_relu: bool = True
    last_relu: bool = True


_KINDS = {
    "bottleneck": _Kind("dense"),
    "separable": _Kind("depthwise", shortcut=False),
    "inverted": _Kind("depthwise", last_relu=False),
    "resnext": _Kind("grouped"),
    "shufflenet": _Kind("depthwise", pointwise="grouped", spatial_relu=False),
}
KINDS = tuple(_KINDS)
_CONV: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, type[nn.BatchNorm2d | nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LARGEST_DENOMINATOR = 64


@dataclass(frozen=True)
class Design:
    """A network of blocks of one kind with the same K/R.

    Attributes:
        kind: one of `KINDS`.
        rank: R of the blocks in the first stage, doubled from stage to stage; see `ranks` for the whole numbers.
        ratio: K/R of every block. A float stands for the nearest fraction with a denominator of 64 or less.
        dims: 2 for images (n, in_channels, h, w), 3 for videos (n, in_channels, t, h, w).
        blocks: how many blocks each stage has. All stages but the first halve the size of the maps.
        num_classes: outputs of the linear classifier.
        in_channels: of the images.
        groups: of the spatial convolutions of `resnext` and of the 1x1 convolutions of `shufflenet`; others have none.

    Raises:
        ConvpareError: on construction, for any other kind or dims, or a number that is not above 0.
    """

    kind: str
    rank: float
    ratio: float | Fraction
    dims: int = 2
    blocks: tuple[int, ...] = (1, 1, 1)
    num_classes: int = 10
    in_channels: int = 3
    groups: int = 4

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConvpareError(f"there is no block design {self.kind!r}; choose one of {', '.join(_KINDS)}.")
        if self.dims not in _CONV:
            raise ConvpareError(f"dims is {self.dims}; give 2 for images or 3 for videos.")
        counts = (*self.blocks, self.num_classes, self.in_channels, self.groups)
        if not self.blocks or min(counts) < 1 or not 0 < self.rank < math.inf or self.exact_ratio <= 0:
            raise ConvpareError(
                f"{self} is no network: rank, ratio, blocks, classes, channels and groups must be above 0."
            )

    @property
    def exact_ratio(self) -> Fraction:
        """K/R as a fraction."""
        return Fraction(self.ratio).limit_denominator(_LARGEST_DENOMINATOR)

    @property
    def step(self) -> int:
        """What every R is a multiple of, so that every K is whole and all channels can be grouped."""
        grouped = "grouped" in (_KINDS[self.kind].spatial, _KINDS[self.kind].pointwise)
        return self.exact_ratio.denominator * (self.groups if grouped else 1)

    @property
    def ranks(self) -> tuple[int, ...]:
        """R of the blocks in each stage: `rank`, 2 `rank`, 4 `rank`, …, to the nearest multiple of `step` above 0."""
        steps = [max(1, round(self.rank * 2**stage / self.step)) for stage in range(len(self.blocks))]
        return tuple(self.step * number for number in steps)

    @property
    def channels(self) -> tuple[int, ...]:
        """K of the blocks in each stage: `exact_ratio` times `ranks`."""
        return tuple(int(self.exact_ratio * rank) for rank in self.ranks)

    def build(self) -> nn.Sequential:
        """The network, untrained: a stem with K channels, the stages, a global average and a linear classifier."""
        before = self.channels[0]
        stem = _conv_norm(self.in_channels, before, 3, self.dims)
        stages = nn.Sequential()
        for stage, (blocks, rank, channels) in enumerate(zip(self.blocks, self.ranks, self.channels, strict=True)):
            for number in range(blocks):
                stages.append(Block(self, before, rank, channels, stride=2 if stage and not number else 1))
                before = channels
        head = nn.Sequential(GlobalAverage(), nn.Linear(before, self.num_classes))
        return nn.Sequential(stem, nn.ReLU(), stages, head)


class Block(nn.Module):
    """One block of a design: (n, c_in, *spatial) -> (n, channels, *spatial / stride), of rank `rank`."""

    def __init__(self, design: Design, c_in: int, rank: int, channels: int, *, stride: int) -> None:
        super().__init__()
        kind, dims = _KINDS[design.kind], design.dims
        groups = {"dense": 1, "grouped": design.groups, "depthwise": rank}
        pointwise = groups[kind.pointwise]
        self.reduce = _conv_norm(c_in, rank, 1, dims, groups=pointwise)
        self.shuffle = ChannelShuffle(pointwise) if pointwise > 1 else nn.Identity()
        self.spatial = _conv_norm(rank, rank, 3, dims, stride=stride, groups=groups[kind.spatial])
        self.expand = _conv_norm(rank, channels, 1, dims, groups=pointwise)
        self.shortcut = ZeroPadSubsample(stride, channels - c_in) if kind.shortcut else None
        self.spatial_relu, self.last_relu = kind.spatial_relu, kind.last_relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.spatial(self.shuffle(F.relu(self.reduce(x))))
        out = self.expand(F.relu(out) if self.spatial_relu else out)
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return F.relu(out) if self.last_relu else out


class ChannelShuffle(nn.Module):
    """Deal the channels of each group out over all groups: channel c of group g goes to place c * groups + g."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        dealt: Tensor = x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return dealt


class ZeroPadSubsample(nn.Module):
    """A shortcut without parameters: every `stride`-th position, then `extra` channels of zeros after the others."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        spatial = x.ndim - 2
        if self.stride > 1:
            every = slice(None, None, self.stride)
            x = x[(slice(None), slice(None), *[every] * spatial)]
        return F.pad(x, (0, 0) * spatial + (0, self.extra)) if self.extra else x


class GlobalAverage(nn.Module):
    """(n, c, *spatial) -> (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def _conv_norm(c_in: int, c_out: int, size: int, dims: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = _CONV[dims](c_in, c_out, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, _NORM[dims](c_out))


def parameters(design: Design) -> int:
    """How many parameters a design's network has; no memory is taken for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in design.build().parameters())


def width_for_params(design: Design, params: int) -> float:
    """The rank at which the design, its other settings unchanged, comes nearest to `params` parameters.

    For comparing ratios at equal size: `replace(design, rank=width_for_params(design, params))`. The result is a
    multiple of `design.step` over 2^(stages - 1), the finest that tells two networks apart in their last stage, which
    has most of the parameters; so R of the earlier stages is half of the next one's up to rounding.

    Raises:
        ConvpareError: `params` is below 1.
    """
    if params < 1:
        raise ConvpareError(f"params is {params}; give the number of parameters to come near to, 1 or more.")
    unit = design.step * 0.5 ** (len(design.blocks) - 1)

    def at(units: int) -> int:
        return parameters(replace(design, rank=units * unit))

    low, high = 1, 2
    while at(high) < params:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < params else (low, middle)
    return unit * min(low, high, key=lambda units: abs(at(units) - params))


def bottleneck_width_factor(ratio: float, reference: float = 4, taps: int = 9) -> float:
    """By what to multiply R when K/R goes from `reference` to `ratio` and the parameters are to stay.

    A bottleneck with an identity shortcut has (2 K/R + taps) R² weights in its convolutions, taps = 9 for 3x3 and 27
    for 3x3x3 kernels; batch norms, stem and classifier are not in this closed form, `width_for_params` counts them.

    Raises:
        ConvpareError: a ratio or the number of taps is not above 0.
    """
    if min(ratio, reference, taps) <= 0:
        raise ConvpareError(f"ratios {ratio} and {reference} and {taps} taps must be above 0.")
    return math.sqrt((2 * reference + taps) / (2 * ratio + taps))
