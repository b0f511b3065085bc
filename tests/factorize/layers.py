"""Layers of every setting, and the cost of a network counted while it runs."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from convpare.graph.structure import Extent

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer with numbers that do not depend on the state of torch."""
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=1000 * seed + n) / math.sqrt(parameter[0].numel()))
    return layer


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution and an input for it."""
    axes, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    into, out = (groups * draw(st.integers(1, 5 - axes)) for _ in range(2))
    several = st.tuples(*[st.integers(1, 3)] * axes)
    kernel, stride = draw(several), draw(several)
    dilation = draw(st.tuples(*[st.integers(1, 2)] * axes))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding: object = tuple(draw(st.integers(0, min(r + 1 - transposed, 3))) for r in reach)
    mode, settings = "zeros", {}
    if transposed:
        most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        settings["output_padding"] = tuple(draw(st.integers(0, m)) for m in most)
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if draw(st.integers(0, 3)) == 0:
            padding = draw(st.sampled_from(["same", "valid"]))
            stride = (1,) * axes if padding == "same" else stride
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    layer = CONVOLUTIONS[axes - 1 + 3 * transposed](
        into, out, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()),
        padding_mode=mode, **settings,
    )  # fmt: skip
    x = noise(2, into, *(3 + r + draw(st.integers(0, 2)) for r in reach), seed=1, dtype=dtype)
    return seeded(layer.to(dtype), draw(st.integers(0, 9))), x


def extent(layer: nn.Module, x: Tensor) -> Extent:
    """Of the call `layer(x)`."""
    axes = layer.weight.ndim - 2
    y = layer(x)
    if isinstance(layer, nn.Linear):
        return Extent(x[..., 0].numel(), (), ())
    return Extent(x.shape[0], tuple(x.shape[-axes:]), tuple(y.shape[-axes:]))


def counted(chain: nn.Sequential, x: Tensor) -> tuple[int, int]:
    """Multiply-accumulates, bias excluded, and parameters, from what is multiplied."""
    macs = 0
    for module in chain:
        y = module(x)
        whole = isinstance(module, nn.Linear)
        transposed = not whole and module.transposed
        seen = x if transposed else y
        places = seen[..., 0].numel() if whole else seen[:, 0].numel()
        macs += places * module.weight.numel()
        x = y
    return macs, sum(p.numel() for p in chain.parameters())
