"""The linear maps of a captured network, convolutions and linear layers, and what stands between them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from convpare.graph.grouping import aliases
from convpare.graph.tracer import operator_name

Kind = Literal["conv", "conv_transpose", "linear"]
KINDS: dict[str, Kind] = {
    "linear": "linear",
    **{f"conv{n}d": "conv" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": "conv_transpose" for n in (1, 2, 3)},
}
MOVES = frozenset(
    """view view_as reshape reshape_as _unsafe_view flatten unflatten permute transpose t movedim squeeze unsqueeze
    expand expand_as contiguous clone alias detach to _to_copy type_as getitem chunk split split_with_sizes slice narrow
    select index_select channel_shuffle pixel_shuffle pixel_unshuffle identity""".split()
)
DROPOUTS = frozenset("dropout feature_dropout alpha_dropout".split())
AFFINE = frozenset(
    """add sub rsub mul div neg mean sum pad constant_pad_nd avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    upsample_bilinear2d upsample_trilinear3d""".split()
)


@dataclass(frozen=True)
class LinearMap:
    """One call of a convolution or linear layer: `channels` enter, `k` leave."""

    node: Node
    name: str
    kind: Kind
    k: int
    channels: int
    kernel: tuple[int, ...]
    groups: int

    @property
    def read(self) -> Node:
        """The value that it reads."""
        return cast(Node, self.node.args[0])

    @property
    def is_pointwise(self) -> bool:
        return self.kind != "conv_transpose" and prod(self.kernel) == 1

    @property
    def is_depthwise(self) -> bool:
        return not self.is_pointwise and self.groups == self.channels > 1

    @property
    def rank(self) -> int:
        """The channels that enter a pointwise map; of a spatial one the largest rank that its kernel can have along the
        output channels, min(k, channels · kernel positions)."""
        return self.channels if self.is_pointwise else min(self.k, self.channels * prod(self.kernel))


@dataclass(frozen=True)
class Link:
    """The linear map before another one, and what stands between: see `Flow.link`."""

    source: LinearMap
    between: str

    @property
    def is_affine(self) -> bool:
        return self.between in ("nothing", "affine")


class Flow:
    """How values flow from linear map to linear map.

    `maps` are the linear maps by their node, in the order of execution; `gates` says which operand of a product is
    gated by the other (squeeze-and-excitation, x · sigmoid(x)); `gating` are the maps that only compute such gates.
    """

    def __init__(self, model: nn.Module, program: ExportedProgram) -> None:
        signature = program.graph_signature
        tied = aliases(model)
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.model = model
        self.tensors = {n: tied.get(named[n.name], named[n.name]) for n in program.graph.nodes if n.name in named}
        self.position = {node: number for number, node in enumerate(program.graph.nodes)}
        self._varying: set[Node] = set()
        for node in self.position:
            inputs = node.op == "placeholder" and node.name in signature.user_inputs
            if inputs or self._varying.intersection(node.all_input_nodes):
                self._varying.add(node)
        self.maps = {node: self._map(node) for node in self.position if node in self._varying and short(node) in KINDS}
        self.gates: dict[Node, Node] = {}
        self.gating: set[Node] = set()
        for node in self.position:
            self._find_gate(node)

    def users(self, node: Node) -> list[Node]:
        """The nodes that read a value, and not its shape or type alone."""
        return [user for user in node.users if user.op == "output" or node in _read(user)]

    def link(self, map: LinearMap) -> Link | None:
        """The linear map before `map`, if what `map` reads is made of its output alone.

        Between the two may stand what keeps channels and positions: moves, normalisations, activations, gates. Nothing
        else may read the values between, but for maps whose outputs are put side by side with that of `map`. Sums,
        concatenations and pooling are no links: `map` then reads a stream.

        Link.between is "nothing", "affine" (batch norm, a scale), or the names of the other operators in their order,
        "gate" for a product with what is computed from the value itself.
        """
        passed: list[Node] = []
        reader, node = map.node, map.read
        while self._is_alone(node, reader):
            if node in self.maps:
                source = self.maps[node]
                return Link(source, self._described(passed[::-1])) if source.k == map.channels else None
            before = self._passed(node)
            if before is None:
                return None
            passed.append(node)
            reader, node = node, before
        return None

    def after(self, map: LinearMap) -> str:
        """What stands between `map` and the next linear map that reads what becomes of its output (the first in the
        order of execution that is not part of a gate), or the end of the network, as in `Link.between`; operators where
        branches join ("add", "cat") are named, too."""
        passed, readers = self._reached(map)
        if readers:
            leading = _origins(min(readers, key=self.position.__getitem__))
            passed = [node for node in passed if node in leading]
        return self._described(passed)

    def makes_output(self, map: LinearMap) -> bool:
        """Whether no linear map comes after this one."""
        return not self._reached(map)[1]

    def _map(self, node: Node) -> LinearMap:
        weight = cast(Node, node.args[1])
        kind = KINDS[short(node)]
        groups = cast(int, node.args[6]) if len(node.args) > 6 else 1
        first, second, *kernel = weight.meta["val"].shape
        k, channels = (second * groups, first) if kind == "conv_transpose" else (first, second * groups)
        owner = self.tensors.get(weight, "").removesuffix(".weight")
        return LinearMap(node, owner or module_of(node) or node.name, kind, k, channels, tuple(kernel), groups)

    def _operands(self, node: Node) -> list[Node]:
        """What it reads of values that depend on the input, each as often as it stands in the arguments."""
        return [x for x in _read(node) if x in self._varying]

    def _kind(self, node: Node) -> str:
        """What an operator does to a value: "nothing", "affine", or its name."""
        name, operands = short(node), self._operands(node)
        if node in self.gates:
            return "gate"
        if len(operands) > 1:
            return name
        if name in MOVES or (name in DROPOUTS and node.args[2] is False):
            return "nothing"
        fixed = name == "batch_norm" and not node.args[5]
        affine = name in AFFINE and (name != "div" or node.args[0] in operands)
        return "affine" if fixed or affine else name

    def _described(self, nodes: Iterable[Node]) -> str:
        kinds = [self._kind(node) for node in nodes]
        names = [kind for kind, _ in groupby(kind for kind in kinds if kind not in ("nothing", "affine"))]
        return ", ".join(names) or ("affine" if "affine" in kinds else "nothing")

    def _passed(self, node: Node) -> Node | None:
        """The value that an operator passes on, position by position; None where it does not."""
        operands = self._operands(node)
        before = self.gates.get(node) or (operands[0] if len(operands) == 1 else None)
        if before is None or "pool" in short(node):
            return None
        sizes = [_numel(before), _numel(node)]
        return before if None not in sizes and (sizes[0] == sizes[1] or "pad" in short(node)) else None

    def _is_alone(self, node: Node, reader: Node) -> bool:
        users = self.users(node)
        return users == [reader] or self.gates.get(reader) is node or self._is_side_by_side(users)

    def _is_side_by_side(self, users: Sequence[Node]) -> bool:
        """Whether these are parallel maps whose outputs are concatenated."""
        joins = {self._join(user) if user in self.maps else None for user in users}
        return len(joins) == 1 and None not in joins and short(cast(Node, joins.pop())) == "cat"

    def _join(self, node: Node) -> Node | None:
        """Where the output of a map meets other values, if it does before the next map."""
        while len(users := self.users(node)) == 1 and users[0] not in self.maps:
            node = users[0]
            if len(self._operands(node)) > 1:
                return node
        return None

    def _reached(self, map: LinearMap) -> tuple[list[Node], list[Node]]:
        """The operators that a map leads to without another linear map between, and the linear maps that follow."""
        seen: set[Node] = set()
        waiting = [map.node]
        while waiting:
            new = [user for user in self.users(waiting.pop()) if user not in seen and user.op != "output"]
            seen.update(new)
            waiting += [user for user in new if user not in self.maps]
        passed = sorted(seen - self.maps.keys(), key=self.position.__getitem__)
        return passed, [node for node in seen if node in self.maps and node not in self.gating]

    def _find_gate(self, node: Node) -> None:
        """A product of a value and what is computed from it alone, or of a value and a smaller one."""
        operands = self._operands(node)
        if short(node) != "mul" or len(operands) != 2 or operands[0] is operands[1]:
            return
        size = _numel(node)
        for main, other in (operands, operands[::-1]):
            inside = self._inside(main, node)
            if _numel(main) == size and inside is not None and other in inside:
                self.gates[node] = main
                self.gating |= inside & self.maps.keys()
                return
        full = [x for x in operands if _numel(x) == size]
        if len(full) == 1 and self.users(full[0]) == [node]:
            self.gates[node] = full[0]

    def _inside(self, start: Node, end: Node) -> set[Node] | None:
        """The nodes between a value and one that all of its users lead to; None where some lead elsewhere."""
        seen: set[Node] = set()
        waiting = [start]
        while waiting:
            node = waiting.pop()
            users = self.users(node)
            if not users or any(self.position[user] > self.position[end] for user in users):
                return None
            new = [user for user in users if user is not end and user not in seen]
            seen.update(new)
            waiting += new
        return seen


def short(node: Node) -> str:
    """`relu` of a node that calls `aten.relu_.default`."""
    return operator_name(node).removeprefix("aten.").rstrip("_") if node.op == "call_function" else node.op


def module_of(node: Node) -> str:
    """The name of the innermost module whose forward runs it."""
    stack: Any = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def _read(node: Node) -> list[Node]:
    """The nodes whose values an operator reads, as often as they stand in its arguments."""
    name = short(node)
    if name == "_assert_tensor_metadata":
        return []
    found: list[Node] = []
    map_arg((node.args[:1], {}) if name.endswith("_as") else (node.args, node.kwargs), found.append)
    return found


def _origins(node: Node) -> set[Node]:
    """All nodes from which a node is computed."""
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - seen
        seen |= new
        waiting += new
    return seen


def _numel(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else None
