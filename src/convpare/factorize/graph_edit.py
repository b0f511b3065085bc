"""Layers of a graph form, which are operators on parameters: as modules, and replaced by chains."""

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.operator_schemas import normalize_function

from convpare.errors import ConvpareError
from convpare.graph.graphform import put
from convpare.graph.tracer import operator_name

KINDS: dict[str, type[nn.Module]] = {
    "aten.conv1d": nn.Conv1d, "aten.conv2d": nn.Conv2d, "aten.conv3d": nn.Conv3d,
    "aten.conv_transpose1d": nn.ConvTranspose1d, "aten.conv_transpose2d": nn.ConvTranspose2d,
    "aten.conv_transpose3d": nn.ConvTranspose3d, "aten.linear": nn.Linear,
}  # fmt: skip
SETTINGS = ("stride", "padding", "dilation", "output_padding")


def is_operator(model: nn.Module, name: str) -> bool:
    """Whether `name` is a place in a graph form that holds tensors alone, which operators read."""
    modules = dict(model.named_modules())
    return isinstance(model, fx.GraphModule) and type(modules.get(name)) is nn.Module


def layer_at(model: fx.GraphModule, name: str) -> nn.Module:
    """A module with the very parameters of a layer, which does what its operator does.

    Raises:
        ConvpareError: the weight is read by no convolution or linear layer alone, or by several in different ways.
    """
    nodes = _calls(model, name)
    described = [_described(node) for node in nodes]
    if any(known != described[0] for known in described[1:]):
        raise ConvpareError(f"{name!r} is called in several ways; leave this layer as it is")
    kind, weight, bias, settings = described[0]
    own, held = model.get_parameter(weight), None if bias is None else model.get_parameter(bias)
    layer = _empty(kind, own, settings)
    layer.register_parameter("weight", own)
    layer.register_parameter("bias", held)
    return layer.train(model.training)


def put_chain_(model: fx.GraphModule, name: str, chain: nn.Sequential) -> None:
    """Let operators on the parameters of a chain's layers do what the operator of a layer did."""
    for number, link in enumerate(chain):
        for key, tensor in link.named_parameters(recurse=False):
            put(model, f"{name}.{number}.{key}", tensor)
    for node in _calls(model, name):
        with model.graph.inserting_before(node):
            x = node.args[0]
            for number, link in enumerate(chain):
                x = _call(model, f"{name}.{number}", link, x)
        cast(Node, x).meta = dict(node.meta)
        node.replace_all_uses_with(cast(Node, x))
        model.graph.erase_node(node)
    for node in [n for n in model.graph.nodes if n.op == "get_attr" and not n.users]:
        model.graph.erase_node(node)
    holder = model.get_submodule(name)
    for key in ("weight", "bias"):
        if key in holder._parameters:
            del holder._parameters[key]
    model.graph.lint()
    model.recompile()


def _calls(model: fx.GraphModule, name: str) -> list[Node]:
    """The operators that read the weight of a layer."""
    held = [n for n in model.graph.nodes if n.op == "get_attr" and n.target == f"{name}.weight"]
    nodes = [user for node in held for user in node.users]
    if not nodes or any(operator_name(n) not in KINDS or _named(n)["weight"] not in held for n in nodes):
        raise ConvpareError(f"the weight of {name!r} is not that of a plain layer alone; leave this layer as it is")
    return nodes


def _named(node: Node) -> dict[str, Any]:
    """The operator's arguments by their names."""
    found = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)  # type: ignore[arg-type]
    assert found is not None
    return dict(found.kwargs)


def _described(node: Node) -> tuple[type[nn.Module], str, str | None, dict[str, Any]]:
    """What it is, the names of its weight and bias, and how it goes along the axes."""
    named = _named(node)
    bias = named.get("bias")
    settings = {key: named[key] for key in (*SETTINGS, "groups") if key in named}
    return KINDS[operator_name(node)], str(named["weight"].target), None if bias is None else str(bias.target), settings


def _empty(kind: Any, weight: Tensor, settings: dict[str, Any]) -> nn.Module:
    if kind is nn.Linear:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    groups = settings.get("groups", 1)
    transposed = issubclass(kind, nn.modules.conv._ConvTransposeNd)
    first, second = weight.shape[0], weight.shape[1] * groups
    into, out = (first, second) if transposed else (second, first)
    along = {key: _each(settings[key]) for key in SETTINGS if key in settings}
    layer: nn.Module = kind(into, out, tuple(weight.shape[2:]), groups=groups, bias=False, device="meta", **along)
    return layer


def _each(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)


def _call(model: fx.GraphModule, name: str, link: nn.Module, x: Any) -> Node:
    """The operator of a plain layer on tensors of the graph."""
    weight = model.graph.get_attr(f"{name}.weight")
    bias = None if link.bias is None else model.graph.get_attr(f"{name}.bias")
    aten = torch.ops.aten
    if isinstance(link, nn.Linear):
        return model.graph.call_function(aten.linear.default, (x, weight, bias))
    conv = cast(Any, link)
    stride, dilation = list(conv.stride), list(conv.dilation)
    padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
    number = len(conv.kernel_size)
    if isinstance(link, nn.modules.conv._ConvTransposeNd):
        operator = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
        transposed: Any = (stride, padding, list(conv.output_padding), conv.groups, dilation)
        return model.graph.call_function(operator[number], (x, weight, bias, *transposed))
    packet = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}[number]
    settings: Any = (stride, padding, dilation, conv.groups)
    target = packet.padding if isinstance(padding, str) else packet.default
    return model.graph.call_function(target, (x, weight, bias, *settings))
