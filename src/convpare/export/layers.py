"""Which operators of a captured graph are layers, and how these are declared."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from convpare.errors import ConvpareError
from convpare.export.spelling import quoted
from convpare.graph.portable import DROPOUTS, NORMS
from convpare.graph.tracer import operator_name

Arguments = Mapping[str, Any]

CONVS = {"aten.conv1d": ("Conv1d", 1), "aten.conv2d": ("Conv2d", 2), "aten.conv3d": ("Conv3d", 3)}
TRANSPOSED = {
    "aten.conv_transpose1d": ("ConvTranspose1d", 1), "aten.conv_transpose2d": ("ConvTranspose2d", 2),
    "aten.conv_transpose3d": ("ConvTranspose3d", 3),
}  # fmt: skip


def declared(node: Node, weight: Tensor, bias: bool) -> str | None:
    """The declaration of the layer that this call of an operator is, such as `nn.Conv2d(3, 8, 3)`; None if it is none.

    Args:
        weight: what the operator takes as its weight.
        bias: whether it takes a bias.
    """
    name = operator_name(node)
    known = KNOWN.get(name)
    return None if known is None else known(name, _arguments(node), weight, bias)


def module(layer: nn.Module) -> str:
    """The declaration of a batch norm or dropout.

    Raises:
        ConvpareError: it is another module.
    """
    kind = type(layer).__name__
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and NORMS.get(kind) is type(layer):
        own = [f"eps={layer.eps!r}"] if layer.eps != 1e-5 else []
        own += [f"momentum={layer.momentum!r}"] if layer.momentum != 0.1 else []
        own += ["affine=False"] if layer.weight is None else []
        assert layer.running_mean is not None
        return _spelled(kind, [len(layer.running_mean)], [*own, *_type(layer.running_mean)])
    if isinstance(layer, nn.modules.dropout._DropoutNd) and DROPOUTS.get(kind) is type(layer):
        return _spelled(kind, [layer.p], [])
    raise ConvpareError(f"the graph calls a {kind}, which has no form in plain PyTorch")


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {known.name: known.default_value for known in schema.arguments if known.has_default_value()}
    found |= dict(zip((known.name for known in schema.arguments), node.args, strict=False))
    return found | dict(node.kwargs)


def _convolution(name: str, given: Arguments, weight: Tensor, bias: bool) -> str | None:
    kind, axes = (CONVS | TRANSPOSED)[name]
    groups, transposed = given["groups"], name in TRANSPOSED
    first, second = weight.shape[0], weight.shape[1] * groups
    own = []
    for key, usual in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1)):
        chosen = _short(given.get(key, usual), axes)
        own += [f"{key}={quoted(chosen) if isinstance(chosen, str) else repr(chosen)}"] if chosen != usual else []
    own += [f"groups={groups!r}"] if groups != 1 else []
    own += [] if bias else ["bias=False"]
    channels = [first, second] if transposed else [second, first]
    return _spelled(kind, [*channels, _short(list(weight.shape[2:]), axes)], [*own, *_type(weight)])


def _linear(name: str, given: Arguments, weight: Tensor, bias: bool) -> str | None:
    own = [] if bias else ["bias=False"]
    return _spelled("Linear", [weight.shape[1], weight.shape[0]], [*own, *_type(weight)])


def _group_norm(name: str, given: Arguments, weight: Tensor, bias: bool) -> str | None:
    own = [f"eps={given['eps']!r}"] if given["eps"] != 1e-5 else []
    return _spelled("GroupNorm", [given["num_groups"], len(weight)], [*own, *_type(weight)]) if bias else None


def _layer_norm(name: str, given: Arguments, weight: Tensor, bias: bool) -> str | None:
    own = [f"eps={given['eps']!r}"] if given["eps"] != 1e-5 else []
    own += [] if bias else ["bias=False"]
    return _spelled("LayerNorm", [_short(list(weight.shape), 1)], [*own, *_type(weight)])


def _prelu(name: str, given: Arguments, weight: Tensor, bias: bool) -> str | None:
    return _spelled("PReLU", [weight.numel()], _type(weight)) if weight.ndim == 1 else None


KNOWN: Mapping[str, Callable[[str, Arguments, Tensor, bool], str | None]] = {
    **dict.fromkeys((*CONVS, *TRANSPOSED), _convolution), "aten.linear": _linear, "aten.group_norm": _group_norm,
    "aten.layer_norm": _layer_norm, "aten.prelu": _prelu,
}  # fmt: skip


def _short(sizes: Any, axes: int) -> Any:
    """One number where all are the same, as PyTorch's layers take it."""
    if not isinstance(sizes, list | tuple):
        return sizes
    alike = len(set(sizes)) == 1 and len(sizes) in (1, axes)
    return sizes[0] if alike else tuple(sizes)


def _type(tensor: Tensor) -> list[str]:
    return [] if tensor.dtype == torch.float32 else [f"dtype={tensor.dtype}"]


def _spelled(kind: str, numbers: list[Any], named: list[str]) -> str:
    return f"nn.{kind}({', '.join([*map(repr, numbers), *named])})"


def attribute(net: fx.GraphModule, name: str) -> Tensor:
    """A tensor by its name."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(net.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)
    return found
