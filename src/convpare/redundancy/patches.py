"""What a kernel sees: the columns of a convolution as a matrix, at chosen output positions only."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.redundancy.gram import gram


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, padding (before, after) and dilation, one for each spatial axis; no axes: a linear layer."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    @staticmethod
    def of(kernel: tuple[int, ...], stride: object, padding: object, dilation: object) -> "Geometry":
        """From the arguments of a convolution: numbers, sequences, "same" or "valid"."""
        spread = _per_axis(dilation, len(kernel))
        if padding == "same":
            extents = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
            pads = tuple((e // 2, e - e // 2) for e in extents)
        else:
            pads = tuple((p, p) for p in _per_axis(0 if padding == "valid" else padding, len(kernel)))
        return Geometry(kernel, _per_axis(stride, len(kernel)), pads, spread)

    @staticmethod
    def of_module(module: nn.Module) -> "Geometry":
        """Of a convolution module, whose padding is taken to be zeros; of any other, a linear layer's."""
        if not isinstance(module, nn.modules.conv._ConvNd) or module.transposed:
            return Geometry()
        return Geometry.of(tuple(module.kernel_size), module.stride, module.padding, module.dilation)

    def outputs(self, spatial: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial shape of the output for an input of spatial shape `spatial`."""
        return tuple(
            (size + before + after - d * (k - 1) - 1) // s + 1
            for size, k, s, (before, after), d in zip(
                spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )


def columns(x: Tensor, geometry: Geometry, places: Tensor, groups: int) -> Tensor:
    """The inputs of the kernel at the flat output positions `places`.

    Args:
        x: (b, channels, *spatial).
        places: (p,) int64.
        groups: of the convolution.

    Returns:
        (groups, channels per group · taps, b · p), rows in the order of a flattened kernel.
    """
    if not geometry.kernel:
        return split_groups(x.reshape(*x.shape[:2], -1)[:, :, places], groups)
    out = geometry.outputs(tuple(x.shape[2:]))
    if any(width for pair in geometry.padding for width in pair):
        x = F.pad(x, [width for pair in reversed(geometry.padding) for width in pair])
    flat = torch.zeros(1, 1, dtype=torch.long, device=x.device)  # (p, taps): positions in x, last axis first
    rest = places.to(x.device)
    for axis in reversed(range(len(out))):
        start = (rest % out[axis]) * geometry.stride[axis]
        rest = rest // out[axis]
        taps = torch.arange(geometry.kernel[axis], device=x.device) * geometry.dilation[axis]
        here = (start[:, None] + taps) * math.prod(x.shape[3 + axis :])
        flat = (here[:, :, None] + flat[:, None, :]).reshape(len(places), -1)
    seen = x.flatten(2)[:, :, flat]  # (b, channels, p, taps)
    b, channels, p, taps_count = seen.shape
    seen = seen.reshape(b, groups, channels // groups, p, taps_count)
    return seen.permute(1, 2, 4, 0, 3).reshape(groups, channels // groups * taps_count, b * p)


def split_groups(x: Tensor, groups: int) -> Tensor:
    """(b, channels, p) → (groups, channels per group, b · p)."""
    b, channels, p = x.shape
    return x.reshape(b, groups, channels // groups, p).permute(1, 2, 0, 3).flatten(2)


def second_moment(x: Tensor) -> Tensor:
    """x xᵀ of x (groups, unknowns, samples), in float64."""
    total = x.new_zeros(*x.shape[:2], x.shape[1], dtype=torch.float64)
    add_second_moment_(total, x)
    return total


def add_second_moment_(total: Tensor, x: Tensor) -> None:
    """Add x xᵀ of x (groups, unknowns, samples) to `total`, in float64.

    What varies is multiplied in the type of x, the mean apart: a large mean would drown small directions in rounding.
    """
    mean = x.mean(2, keepdim=True)
    varying = x - mean
    total += gram(varying)
    wide, rest = mean.double(), varying.sum(2, keepdim=True).double()
    total.baddbmm_(torch.cat([wide, rest], 2), torch.cat([x.shape[2] * wide + rest, wide], 2).mT)


def draw_places(total: int, share: float, generator: torch.Generator) -> Tensor:
    """A random share of `total` flat positions, at least one, shape (p,)."""
    if share >= 1:
        return torch.arange(total)
    return torch.randperm(total, generator=generator)[: max(1, round(share * total))]


def _per_axis(value: object, axes: int) -> tuple[int, ...]:
    listed = (value,) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type]
    return listed * axes if len(listed) == 1 else listed
