"""A captured graph as Python code: a class with its layers by name, and a forward that calls them one by one."""

import keyword
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx import Node

from convpare.errors import ConvpareError
from convpare.export.layers import attribute, declared, module
from convpare.export.spelling import call, value

POOL = ("x", "y", "z", "u", "v", "w")
ATTRIBUTES = frozenset(dir(nn.Module()))  # names that a layer cannot have
GLOBALS = frozenset({"self", "torch", "nn", "F", "float"})  # names that a variable cannot have
SPECIAL = {operator.getitem: "getitem", operator.mul: "mul", getattr: "getattr"}


@dataclass(frozen=True)
class Written:
    """The code of a class, and the tensors of its state by their names in it."""

    code: str
    state: dict[str, Tensor]


def written(net: fx.GraphModule, class_name: str) -> Written:
    """The graph form `net` as a class of plain PyTorch.

    Raises:
        ConvpareError: it holds something that has no form in plain PyTorch.
    """
    return _Writer(net).write(class_name)


class _Writer:
    """Declares what the graph uses, then writes a line for each of its nodes."""

    def __init__(self, net: fx.GraphModule) -> None:
        self.net = net
        self.nodes = [n for n in net.graph.nodes if n.users or n.op in ("placeholder", "output") or _changes(n)]
        self.layers = {node: owner for node in self.nodes if (owner := self._owner(node)) is not None}
        self.declarations = self._declarations()
        self.layers = {node: owner for node, owner in self.layers.items() if owner in self.declarations}
        self.leaves = self._leaves()
        self.names = _distinct([*self.declarations, *self._tensors()], ATTRIBUTES)
        self.variables = _Variables(self.nodes)

    def write(self, class_name: str) -> Written:
        state = self._state()
        first = {id(x): name for name, x in reversed(state.items())}
        ties = [f"self.{name} = self.{first[id(x)]}" for name, x in state.items() if first[id(x)] != name]
        inputs = ", ".join(self.variables.of(n) for n in self.nodes if n.op == "placeholder")
        lines = [
            f"class {class_name}(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in (*self._declared(), *ties)),
            "",
            f"    def forward(self, {inputs}):",
            *(f"        {line}" for line in self._forward()),
        ]
        fresh = {id(x): x.detach().clone(memory_format=torch.contiguous_format) for x in state.values()}
        return Written("\n".join(lines) + "\n", {name: fresh[id(x)] for name, x in state.items()})

    def _owner(self, node: Node) -> str | None:
        """The name of the layer that this node is a call of, if it can be one."""
        if node.op == "call_module":
            return str(node.target)
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            return None
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        weight, bias = given.get("weight"), given.get("bias")
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return None
        owner, _, leaf = str(weight.target).rpartition(".")
        its_bias = f"{owner}.bias" if isinstance(bias, Node) and bias.op == "get_attr" else None
        if leaf != "weight" or not owner or (bias is not None and str(getattr(bias, "target", "")) != its_bias):
            return None
        return owner

    def _declarations(self) -> dict[str, str]:
        """How each layer is declared; none where two calls would declare it otherwise."""
        found: dict[str, set[str | None]] = {}
        for node, owner in self.layers.items():
            if node.op == "call_module":
                text: str | None = module(self.net.get_submodule(owner))
            else:
                bias = any(x.target == f"{owner}.bias" for x in node.all_input_nodes)
                text = declared(node, attribute(self.net, f"{owner}.weight"), bias)
            found.setdefault(owner, set()).add(text)
        alike = {owner: next(iter(texts)) for owner, texts in found.items() if len(texts) == 1}
        return {owner: text for owner, text in alike.items() if text is not None}

    def _tensors(self) -> list[str]:
        """The parameters and buffers that the graph reads and no layer holds."""
        read = (str(n.target) for n in self.nodes if n.op == "get_attr" and not self._only_of_layers(n))
        return [name for name in dict.fromkeys(read) if not self._held(name)]

    def _only_of_layers(self, node: Node) -> bool:
        return all(user in self.layers and self.layers[user] == str(node.target).rpartition(".")[0]
                   for user in node.users)  # fmt: skip

    def _held(self, name: str) -> bool:
        owner = name.rpartition(".")[0]
        return name.rpartition(".")[2] in self.leaves.get(owner, ())

    def _leaves(self) -> dict[str, list[str]]:
        """The names of each layer's tensors in it."""
        found = {}
        for node, owner in self.layers.items():
            if node.op == "call_module":
                held = self.net.get_submodule(owner)
                own = (*held._parameters.items(), *held._buffers.items())
                found[owner] = [name for name, x in own if x is not None]
            else:
                used = {str(x.target) for x in node.all_input_nodes}
                found[owner] = [leaf for leaf in ("weight", "bias") if f"{owner}.{leaf}" in used]
        return found

    def _state(self) -> dict[str, Tensor]:
        """Every tensor by its name in the code."""
        found = {f"{self.names[owner]}.{leaf}": attribute(self.net, f"{owner}.{leaf}")
                 for owner in self.declarations for leaf in self.leaves[owner]}  # fmt: skip
        return found | {self.names[name]: attribute(self.net, name) for name in self._tensors()}

    def _declared(self) -> list[str]:
        lines = [f"self.{self.names[owner]} = {text}" for owner, text in self.declarations.items()]
        for name in self._tensors():
            x, own = attribute(self.net, name), self.names[name]
            empty = f"torch.zeros({list(x.shape)}, dtype={x.dtype})"
            if isinstance(x, nn.Parameter):
                lines.append(f"self.{own} = nn.Parameter({empty})")
            else:
                lines.append(f'self.register_buffer("{own}", {empty})')
        return lines

    def _forward(self) -> list[str]:
        lines = []
        for node in self.nodes:
            if node.op == "output":
                lines.append(f"return {self._spell(node.args[0])}")
            elif node.op in ("call_function", "call_module"):
                text = self._text(node)
                lines.append(f"{self.variables.made(node)} = {text}")
        return lines

    def _text(self, node: Node) -> str:
        if node in self.layers:
            return f"self.{self.names[self.layers[node]]}({self._spell(node.args[0])})"
        if node.op != "call_function":
            raise ConvpareError(f"the graph has a node of kind {node.op}, which cannot be written as code")
        target = node.target
        name = str(target) if isinstance(target, OpOverload) else SPECIAL.get(cast(object, target))  # type: ignore[call-overload]
        if name is None:
            raise ConvpareError(f"the graph calls {target}, which cannot be written as code")
        return call(name, node.args, node.kwargs, self._spell)

    def _spell(self, given: object) -> str:
        return value(given, self._name)

    def _name(self, node: Node) -> str:
        if node.op != "get_attr":
            return self.variables.of(node)
        name = str(node.target)
        if self._held(name):
            owner, _, leaf = name.rpartition(".")
            return f"self.{self.names[owner]}.{leaf}"
        return f"self.{self.names[name]}"


class _Variables:
    """Names of what is computed. As soon as nobody reads a value any more, its name goes to the next."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.last: dict[Node, Node] = {}
        inputs, kept = [], []
        for node in nodes:
            for read in node.all_input_nodes:
                self.last[read] = node
            inputs += [node] if node.op == "placeholder" else []
            kept += [node] if _is_number(node) else []
        self.names = _distinct_nodes([*inputs, *kept])
        self.order = [self.names[n] for n in inputs]
        self.free: list[str] = []

    def of(self, node: Node) -> str:
        return self.names[node]

    def made(self, node: Node) -> str:
        """The name for what this node gives, once its arguments have been spelled."""
        for read in dict.fromkeys(node.all_input_nodes):
            if self.last.get(read) is node and self.names.get(read) in self.order:
                self.free.append(self.names[read])
        if node in self.names:
            return self.names[node]
        if not self.free:
            taken = {*self.order, *self.names.values()}
            pool = (*POOL, *(f"x{n}" for n in range(1, len(self.order) + 2)))
            self.order.append(next(name for name in pool if name not in taken))
            self.free.append(self.order[-1])
        self.free.sort(key=self.order.index)
        self.names[node] = self.free.pop(0)
        return self.names[node]


def _is_number(node: Node) -> bool:
    """Whether the node gives a size or a device: such keep a name of their own."""
    return node.op == "call_function" and (
        node.target in (operator.mul, getattr) or str(node.target) == "aten.sym_size.int"
    )


def _changes(node: Node) -> bool:
    """Whether the node writes into one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _distinct_nodes(nodes: Iterable[Node]) -> dict[Node, str]:
    wanted = {}
    for node in nodes:
        plain = str(node.target) if node.op == "placeholder" else node.name
        wanted[node] = "batch" if str(node.target) == "aten.sym_size.int" else plain
    names = list(wanted.values())
    spelled = _distinct([f"{name}@{at}" for at, name in enumerate(names)], GLOBALS)
    return {node: spelled[f"{name}@{at}"] for at, (node, name) in enumerate(wanted.items())}


def _distinct(names: Iterable[str], reserved: frozenset[str]) -> dict[str, str]:
    """An identifier for each name, no two alike: dots become underscores. What follows an @ is left out."""
    found: dict[str, str] = {}
    taken = set(reserved)
    for name in names:
        plain = "".join(c if c.isalnum() and c.isascii() else "_" for c in name.partition("@")[0]) or "_"
        plain = f"_{plain}" if plain[0].isdigit() else plain
        candidate, number = plain, 1
        while candidate in taken or keyword.iskeyword(candidate):
            number += 1
            candidate = f"{plain}_{number}"
        taken.add(candidate)
        found[name] = candidate
    return found
