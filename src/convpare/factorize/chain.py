"""Chains of plain layers: what they compute, what they cost, how they are built."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convpare.errors import ConvpareError
from convpare.factorize.forms import Shape
from convpare.graph.structure import Extent
from convpare.modes import eval_mode, one_thread
from convpare.redundancy.cuts import Kernel

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kernel_of(layer: nn.Module) -> Kernel:
    """The kernel of a convolution or linear layer.

    Raises:
        ConvpareError: the layer is neither, computes something of its own, or its weight is no real numbers.
    """
    if not any(_is_plain(layer, base) for base in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        raise ConvpareError(
            f"a layer of type {type(layer).__name__} cannot be factorized; give one that computes what PyTorch's "
            "Linear, Conv1d to Conv3d or ConvTranspose1d to ConvTranspose3d compute"
        )
    with eval_mode(layer), torch.no_grad():  # a parametrised weight is computed when read
        weight: Any = layer.weight
    if is_lazy(weight) or not weight.is_floating_point():
        raise ConvpareError(
            f"a weight of {weight.dtype}, {type(weight).__name__}, is no real numbers; give a trained layer"
        )
    if weight.device.type == "mps":  # which has no float64
        weight = weight.cpu()
    with one_thread():
        return Kernel.of(weight, getattr(layer, "groups", 1), is_transposed(layer))


def is_transposed(layer: nn.Module) -> bool:
    return bool(getattr(layer, "transposed", False))


@dataclass(frozen=True)
class Layout:
    """What a chain consists of, without its numbers.

    Attributes:
        shapes: of its links: (groups, o, i, *spatial), o and i within one group.
        transposed: whether the spatial links are transposed convolutions.
        bias: how many parameters the bias has.
    """

    shapes: tuple[Shape, ...]
    transposed: bool = False
    bias: int = 0

    @property
    def params(self) -> int:
        """Parameters, bias included. Filters that channels share count once for each channel, as they are stored."""
        return sum(map(math.prod, self.shapes)) + self.bias

    def macs(self, extents: Iterable[Extent]) -> int:
        """Multiply-accumulates for these calls of the layer, batch included, bias not."""
        return sum(
            extent.batch * math.prod(shape) * math.prod(self._positions(n, extent))
            for extent in extents
            for n, shape in enumerate(self.shapes)
        )

    def outputs(self, extents: Iterable[Extent]) -> int:
        """Output elements of all links for these calls of the layer, batch included."""
        return sum(
            extent.batch * math.prod(shape[:2]) * math.prod(self.sizes_after(n, extent))
            for extent in extents
            for n, shape in enumerate(self.shapes)
        )

    @property
    def bearers(self) -> tuple[int, ...]:
        """For each spatial index the link that strides and pads along it.

        It is the one whose kernel extends along the index; where the layer's does not, the one that makes the others
        cheapest.
        """
        spare = len(self.shapes) - 1 if self.transposed else 0
        along = zip(*(shape[3:] for shape in self.shapes), strict=True)
        return tuple(next((n for n, size in enumerate(sizes) if size > 1), spare) for sizes in along)

    def sizes_after(self, link: int, extent: Extent) -> tuple[int, ...]:
        """Along each axis the size of a link's output, in this call of the layer."""
        return self._positions(link, extent, after=True)

    def _positions(self, link: int, extent: Extent, after: bool = False) -> tuple[int, ...]:
        """Along each axis how often a link applies its kernel; or the size of its output."""
        done = [bearer < link or (bearer == link and (after or not self.transposed)) for bearer in self.bearers]
        return tuple(extent.out[n] if d else extent.into[n] for n, d in enumerate(done))


def layout_of(links: tuple[Kernel, ...], transposed: bool = False, bias: int = 0) -> Layout:
    return Layout(tuple(tuple(link.tensor.shape) for link in links), transposed, bias)


def compose(links: tuple[Kernel, ...]) -> Kernel:
    """The kernel of a chain."""
    return reduce(_compose, links)


def build(layer: nn.Module, links: tuple[Kernel, ...]) -> nn.Sequential:
    """Plain layers with these kernels, in the layer's place: its stride, padding, bias, dtype, device and mode."""
    bearers = layout_of(links, is_transposed(layer)).bearers
    axes = [{axis for axis, bearer in enumerate(bearers) if bearer == n} for n in range(len(links))]
    with eval_mode(layer):
        weight: Any = layer.weight
    modules = [_module(layer, weight, link, own) for link, own in zip(links, axes, strict=True)]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if bias is not None:
        modules[-1].bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return nn.Sequential(*modules).train(layer.training)


def _module(layer: nn.Module, weight: Tensor, link: Kernel, axes: set[int]) -> nn.Module:
    """One link without bias, in the layer's place; `axes` are those along which it strides and pads."""
    transposed = is_transposed(layer) and bool(axes)
    groups, out, into, *size = link.tensor.shape
    module: nn.Module
    if isinstance(layer, nn.Linear):
        module = nn.Linear(into, out, bias=False, device="meta")
    else:
        settings = _settings(layer, axes, transposed)
        kind: Any = (TRANSPOSED if transposed else CONVOLUTIONS)[len(size) - 1]
        module = kind(groups * into, groups * out, tuple(size), groups=groups, bias=False, device="meta", **settings)
    own = link.weight(transposed).to(weight.device, weight.dtype, copy=True)
    module.weight = nn.Parameter(own, weight.requires_grad)
    return module


def _settings(layer: nn.Module, axes: set[int], transposed: bool) -> dict[str, Any]:
    names = {"stride": 1, "padding": 0, "dilation": 1, **({"output_padding": 0} if transposed else {})}
    settings: dict[str, Any] = {name: _along(getattr(layer, name), axes, rest) for name, rest in names.items()}
    return {**settings, "padding_mode": layer.padding_mode if axes else "zeros"}


def _along(value: str | tuple[int, ...], axes: set[int], rest: int) -> str | int | tuple[int, ...]:
    if isinstance(value, str):  # "same" or "valid"
        return value if axes else rest
    return tuple(x if axis in axes else rest for axis, x in enumerate(value))


def _is_plain(layer: nn.Module, base: type[nn.Module]) -> bool:
    methods = ("forward", "_conv_forward", "_output_padding")
    return isinstance(layer, base) and all(
        getattr(type(layer), name, None) is getattr(base, name, None) for name in methods
    )


def _compose(first: Kernel, second: Kernel) -> Kernel:
    """Two links in a row: one's groups divide the other's, and they extend along different indices."""
    sizes = [t.tensor.shape[3:] for t in (second, first)]
    groups = min(first.groups, second.groups)
    finer = max(first.groups, second.groups) // groups
    a, b = (t.tensor.reshape(*t.tensor.shape[:3], -1) for t in (first, second))
    if first.groups >= second.groups:
        a = a.reshape(groups, finer, *a.shape[1:])
        b = b.reshape(groups, b.shape[1], finer, -1, b.shape[-1])
        both = torch.einsum("zokrs,zkrit->zokist", b, a).flatten(2, 3)
    else:
        a = a.reshape(groups, finer, -1, *a.shape[2:])
        b = b.reshape(groups, finer, *b.shape[1:])
        both = torch.einsum("zkors,zkrit->zkoist", b, a).flatten(1, 2)
    axes = range(3, 3 + len(sizes[0]))
    apart = both.reshape(*both.shape[:3], *sizes[0], *sizes[1])
    paired = apart.permute(0, 1, 2, *(n for axis in axes for n in (axis, axis + len(sizes[0]))))
    return Kernel(paired.reshape(*both.shape[:3], *(s * t for s, t in zip(*sizes, strict=True))))
