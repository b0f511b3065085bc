"""How operators and values are spelled in code that people read; what is not here is spelled as PyTorch's operator."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from convpare.errors import ConvpareError

Spell = Callable[[Any], str]

FUNCTIONS = {
    "aten.relu.default": "F.relu", "aten.relu6.default": "F.relu6", "aten.silu.default": "F.silu",
    "aten.gelu.default": "F.gelu", "aten.hardtanh.default": "F.hardtanh", "aten.hardswish.default": "F.hardswish",
    "aten.hardsigmoid.default": "F.hardsigmoid", "aten.leaky_relu.default": "F.leaky_relu",
    "aten.mish.default": "F.mish", "aten.prelu.default": "F.prelu", "aten.sigmoid.default": "torch.sigmoid",
    "aten.tanh.default": "torch.tanh", "aten.softmax.int": "torch.softmax", "aten.cat.default": "torch.cat",
    "aten.matmul.default": "torch.matmul", "aten.flatten.using_ints": "torch.flatten",
    "aten.max_pool1d.default": "F.max_pool1d", "aten.max_pool2d.default": "F.max_pool2d",
    "aten.max_pool3d.default": "F.max_pool3d", "aten.avg_pool1d.default": "F.avg_pool1d",
    "aten.avg_pool2d.default": "F.avg_pool2d", "aten.avg_pool3d.default": "F.avg_pool3d",
    "aten.adaptive_avg_pool1d.default": "F.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d.default":
    "F.adaptive_avg_pool2d", "aten.adaptive_avg_pool3d.default": "F.adaptive_avg_pool3d", "aten.pad.default": "F.pad",
    "aten.conv1d.default": "F.conv1d", "aten.conv2d.default": "F.conv2d", "aten.conv3d.default": "F.conv3d",
    "aten.linear.default": "F.linear",
}  # fmt: skip
"""Functions of torch and torch.nn.functional that take the operator's arguments in the same order."""
METHODS = {
    "aten.relu_.default": "relu_", "aten.add_.Tensor": "add_", "aten.mul_.Tensor": "mul_", "aten.view.default": "view",
    "aten.reshape.default": "reshape", "aten.permute.default": "permute", "aten.transpose.int": "transpose",
    "aten.unsqueeze.default": "unsqueeze", "aten.squeeze.dim": "squeeze", "aten.expand.default": "expand",
    "aten.contiguous.default": "contiguous", "aten.mean.dim": "mean", "aten.chunk.default": "chunk",
    "aten.split.Tensor": "split", "aten.clone.default": "clone", "aten.clamp.default": "clamp",
    "aten.split_with_sizes.default": "split", "aten.index_select.default": "index_select",
}  # fmt: skip
IN_PLACE = {
    "aten.silu_.default": "F.silu", "aten.hardswish_.default": "F.hardswish", "aten.hardtanh_.default": "F.hardtanh",
    "aten.hardsigmoid_.default": "F.hardsigmoid", "aten.leaky_relu_.default": "F.leaky_relu",
    "aten.mish_.default": "F.mish",
}  # fmt: skip
INFIX = {"aten.add.Tensor": "+", "aten.sub.Tensor": "-", "aten.mul.Tensor": "*", "aten.div.Tensor": "/", "mul": "*"}
END = 2**63 - 1  # what a slice without an end goes up to


def call(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any], spell: Spell) -> str:
    """The call of an operator (`aten.relu.default`) on values that `spell` spells."""
    given = [spell(value) for value in args]
    named = [f"{key}={spell(value)}" for key, value in kwargs.items()]
    if operator in INFIX and len(given) == 2 and not named:
        return f"{given[0]} {INFIX[operator]} {given[1]}"
    if (index := _index(operator, args, given)) is not None:
        return f"{given[0]}{index}"
    if operator in IN_PLACE:
        return f"{IN_PLACE[operator]}({', '.join([*given, 'inplace=True'])})"
    if operator in METHODS:
        return f"{given[0]}.{METHODS[operator]}({', '.join([*given[1:], *named])})"
    return f"{FUNCTIONS.get(operator, f'torch.ops.{operator}')}({', '.join([*given, *named])})"


def _index(operator: str, args: Sequence[Any], given: Sequence[str]) -> str | None:
    """What stands after a tensor from which something is taken, such as `[:, 3:5]`; None of other operators."""
    known = {"getitem": "[{}]", "getattr": ".device", "aten.sym_size.int": ".shape[{}]", "aten.alias.default": ""}
    if operator in known:
        return known[operator].format(*given[1:])
    if operator not in ("aten.slice.Tensor", "aten.select.int") or len(args) < 2 or args[1] < 0:
        return None
    colons = ":, " * args[1]
    if operator == "aten.select.int":
        return f"[{colons}{given[2]}]"
    start = "" if len(args) < 3 or args[2] in (0, None) else given[2]
    stop = "" if len(args) < 4 or args[3] in (END, None) else given[3]
    return f"[{colons}{start}:{stop}]" if len(args) < 5 else None


def value(given: Any, name: Callable[[Node], str]) -> str:
    """A constant or, by the names that `name` gives, what was computed.

    Raises:
        ConvpareError: it is of a kind that has no spelling.
    """

    def of(item: Any) -> str:
        return value(item, name)

    spellings: Mapping[Any, Callable[[Any], str]] = {
        Node: name, str: quoted, float: lambda x: repr(x) if math.isfinite(x) else f'float("{x}")',
        (type(None), int, torch.dtype, torch.memory_format, torch.layout): str,
        Mapping: lambda x: "{" + ", ".join(f"{quoted(str(key))}: {of(item)}" for key, item in x.items()) + "}",
        (list, torch.Size): lambda x: "[" + ", ".join(map(of, x)) + "]",
        tuple: lambda x: "(" + "".join(f"{of(item)}, " for item in x).rstrip() + ")",
    }  # fmt: skip
    for kind, spell in spellings.items():
        if isinstance(given, kind):
            return spell(given)
    raise ConvpareError(f"the graph has a {type(given).__name__} among its arguments, which cannot be written as code")


def quoted(text: str) -> str:
    """A text in double quotes: JSON's escapes are Python's, too."""
    return json.dumps(text, ensure_ascii=False)
