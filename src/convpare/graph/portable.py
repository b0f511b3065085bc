"""A graph form as plain JSON and back: operators by name, nothing that could run other code.

What comes back are PyTorch's own operators, batch norms and dropouts alone; a name that is none of them is refused.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx import Node

from convpare.errors import ConvpareError
from convpare.graph.graphform import put, put_module
from convpare.graph.rules import RULES

NORMS: dict[str, type[nn.Module]] = {
    "BatchNorm1d": nn.BatchNorm1d, "BatchNorm2d": nn.BatchNorm2d, "BatchNorm3d": nn.BatchNorm3d,
}  # fmt: skip
DROPOUTS: dict[str, type[nn.Module]] = {
    "Dropout": nn.Dropout, "Dropout2d": nn.Dropout2d, "AlphaDropout": nn.AlphaDropout,
}  # fmt: skip
PLAIN = {"getitem": operator.getitem, "mul": operator.mul, "device": getattr}
NAMED = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


def to_json(net: fx.GraphModule) -> dict[str, Any]:
    """The graph of `net` and the modules in it; its tensors by shape and type alone.

    Raises:
        ConvpareError: it holds something that has no name here.
    """
    tensors = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}
    called = {str(node.target) for node in net.graph.nodes if node.op == "call_module"}
    return {
        "class": type(net).__name__,
        "tensors": {name: _tensor_to_json(x) for name, x in tensors.items()},
        "modules": {name: _module_to_json(net.get_submodule(name)) for name in sorted(called)},
        "nodes": [_node_to_json(node) for node in net.graph.nodes],
    }


def from_json(data: Mapping[str, Any]) -> fx.GraphModule:
    """The module that `to_json` described, with empty tensors of its kinds, in evaluation mode.

    Raises:
        ConvpareError: it names an operator or a module that is not PyTorch's, or contradicts itself.
    """
    try:
        root = nn.Module()
        for name, known in data["modules"].items():
            put_module(root, name, _module_from_json(known))
        for name, known in data["tensors"].items():
            put(root, name, _tensor_from_json(known))
        graph, nodes = fx.Graph(), cast(dict[str, Node], {})
        known_names = {*data["tensors"], *data["modules"]}
        for described in data["nodes"]:
            if described["op"] in ("get_attr", "call_module") and described["target"] not in known_names:
                raise ConvpareError(f"its graph reads {str(described['target'])[:60]!r}, which it does not have")
            nodes[described["name"]] = _node_from_json(graph, described, nodes)
        graph.lint()
        return fx.GraphModule(root, graph, class_name=_identifier(data["class"])).eval()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, SyntaxError) as error:
        raise ConvpareError(f"its graph cannot be built ({type(error).__name__}: {str(error)[:200]})") from error


def _tensor_to_json(tensor: Tensor) -> dict[str, Any]:
    kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    return {"kind": kind, "shape": list(tensor.shape), "dtype": _short(tensor.dtype), "grad": tensor.requires_grad}


def _tensor_from_json(known: Mapping[str, Any]) -> Tensor:
    """An empty one: the weights' file fills it."""
    tensor = torch.empty([0] * len(known["shape"]), dtype=_named("dtype", known["dtype"]))
    return nn.Parameter(tensor, requires_grad=bool(known["grad"])) if known["kind"] == "parameter" else tensor


def _module_to_json(module: nn.Module) -> dict[str, Any]:
    kind = type(module).__name__
    if NORMS.get(kind) is type(module):
        affine = module.weight is not None
        return {"kind": kind, "eps": module.eps, "momentum": module.momentum, "affine": affine}
    if DROPOUTS.get(kind) is type(module):
        return {"kind": kind, "p": module.p}
    raise ConvpareError(f"the graph calls a {kind}, which has no portable form")


def _module_from_json(known: Mapping[str, Any]) -> nn.Module:
    kind = known["kind"]
    if kind in NORMS:
        return NORMS[kind](0, eps=float(known["eps"]), momentum=known["momentum"], affine=bool(known["affine"]))
    if kind in DROPOUTS:
        return DROPOUTS[kind](p=float(known["p"]))
    raise ConvpareError(f"its graph calls a {str(kind)[:60]!r}, which is no module of the graph form")


def _node_to_json(node: Node) -> dict[str, Any]:
    target = node.target
    if isinstance(target, OpOverload):
        target = str(target)
    elif target in PLAIN.values():
        target = next(name for name, known in PLAIN.items() if known is target)
    elif not isinstance(target, str):
        raise ConvpareError(f"the graph calls {target}, which has no portable form")
    args, kwargs = _value_to_json(list(node.args)), {k: _value_to_json(v) for k, v in node.kwargs.items()}
    return {"name": node.name, "op": node.op, "target": target, "args": args, "kwargs": kwargs}


def _node_from_json(graph: fx.Graph, known: Mapping[str, Any], nodes: Mapping[str, Node]) -> Node:
    op, target = known["op"], known["target"]
    args = tuple(_value_from_json(v, nodes) for v in known["args"])
    kwargs = {_identifier(k): _value_from_json(v, nodes) for k, v in known["kwargs"].items()}
    if op == "output":
        return cast(Node, graph.output(args[0]))
    if op not in ("placeholder", "get_attr", "call_module", "call_function"):
        raise ConvpareError(f"its graph has a node of kind {str(op)[:60]!r}")
    for part in (known["name"], *(target.split(".") if op != "call_function" else ())):
        _identifier(part if not part.isdigit() else "_")
    if op == "call_function":
        if target == "device":
            args = (args[0], "device")
        target = _operator(target)
    return graph.create_node(op, target, args, kwargs, name=known["name"])


def _operator(name: str) -> Any:
    """One of PyTorch's operators on tensors."""
    if name in PLAIN:
        return PLAIN[name]
    space, _, rest = str(name).partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None) if space == "aten" else None
    if not isinstance(found, OpOverload):
        raise ConvpareError(f"its graph calls {name[:60]!r}, which is no operator of PyTorch")
    takes_text = any("str" in str(argument.type) for argument in found._schema.arguments)
    if f"aten.{packet}" not in RULES and takes_text:
        raise ConvpareError(f"its graph calls {name[:60]!r}, which is not allowed in an artifact")
    return found


def _value_to_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | torch.Size):
        return [_value_to_json(v) for v in value]
    return _tagged(value)


def _tagged(value: Any) -> dict[str, Any]:
    """What JSON has no word for, under the name of its kind."""
    if isinstance(value, Node | float):
        return {"node": value.name} if isinstance(value, Node) else {"float": str(value)}
    if isinstance(value, Mapping):
        return {"dict": [[key, _value_to_json(v)] for key, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_value_to_json(v) for v in value]}
    for kind, known in NAMED.items():
        if isinstance(value, known):
            return {kind: _short(value)}
    raise ConvpareError(f"the graph has a {type(value).__name__} among its arguments, which has no portable form")


def _value_from_json(value: Any, nodes: Mapping[str, Node]) -> Any:
    if isinstance(value, list):
        return [_value_from_json(v, nodes) for v in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind in ("node", "float"):
        return nodes[content] if kind == "node" else float(content)
    if kind == "dict":
        return {str(key): _value_from_json(v, nodes) for key, v in content}
    return tuple(_value_from_json(v, nodes) for v in content) if kind == "tuple" else _named(kind, content)


def _named(kind: str, name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, NAMED[kind]):
        raise ConvpareError(f"its graph has {str(name)[:60]!r} where a {kind} is expected")
    return found


def _short(value: object) -> str:
    return str(value).removeprefix("torch.")


def _identifier(name: str) -> str:
    """Names end up in the code that the graph is printed to: none may be more than a name."""
    if not str(name).isidentifier():
        raise ConvpareError(f"its graph has the name {str(name)[:60]!r}")
    return str(name)
