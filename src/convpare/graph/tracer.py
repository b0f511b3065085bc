"""What a rule sees of the trace, and what it may say: a `Tracer` is handed to every rule as `t`."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Node

from convpare.graph.labels import Labels, Value
from convpare.graph.structure import Axis, Extent, Form, Layer, Mender, Path
from convpare.graph.sync import feature_mender


@dataclass(frozen=True)
class Spelled:
    """A number that stands in a node's arguments.

    Attributes:
        node, path: where it stands.
        labels: of the channels that it counts, shape (number,).
        sign, offset: it is `sign` times how many of these stay, plus `offset`.
        whole: the labels of the whole axis that it speaks of, for menders.
        modules: the modules around it, the innermost last.
        site: the line of the forward that wrote it, with the class of its module; alike for all modules of a kind.
        where: for messages.
    """

    node: Node
    path: Path
    labels: Tensor
    sign: int
    offset: int
    whole: Tensor
    modules: tuple[str, ...]
    site: tuple[str, ...]
    where: str


@dataclass
class Tracer:
    """The state of one trace. Rules read the operator that runs now and say what it couples."""

    root: nn.Module
    form: Form
    labels: Labels = field(default_factory=Labels)

    def __post_init__(self) -> None:
        self.node: Node = cast(Node, None)
        self.spoiled = False  # an operator wrote in place what is not zero where a channel is
        self.sums: list[tuple[Tensor, str]] = []
        self.part = ""  # the submodule that was captured
        self.tensors: dict[str, Value] = {}  # parameters and buffers
        self.parameters = {name for name, _ in self.root.named_parameters()}
        self.names: dict[str, str] = {}  # node → the parameter or buffer that it is
        self.slots: dict[Axis, int] = {}
        self.layers: dict[str, Layer] = {}
        self.held: set[Node] = set()  # weights, buffers and constants
        self.applied: dict[Node, str] = {}  # operator → the weight of the layer that it is
        self.spelled: list[Spelled] = []
        self.spared: set[Axis] = set()
        self.packed: list[Tensor] = []
        self.features: list[tuple[str, Tensor, Mender]] = []
        self.shuffles: list[tuple[Node, Tensor, Tensor]] = []
        self.uncounted: Counter[str] = Counter()
        self.constants: dict[str, Tensor] = {}
        self.modules = dict(self.root.named_modules(remove_duplicate=False))

    # ------------------------------------------------------------------------------------------- the operator that runs

    @property
    def name(self) -> str:
        """The operator, without overload: `aten.conv2d`."""
        return operator_name(self.node)

    @property
    def target(self) -> Callable[..., Any]:
        return cast(Callable[..., Any], self.node.target)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its output."""
        return tuple(self.node.meta["val"].shape)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its outputs, for operators that have several."""
        return [tuple(v.shape) for v in self.node.meta["val"]]

    @property
    def around(self) -> tuple[str, ...]:
        """The names of the modules whose forwards run it, the innermost last."""
        stack = (self.node.meta.get("nn_module_stack") or {}).values()
        names = (str(name).partition("@")[0] for name, _ in stack)  # name@1 where a module runs again
        return tuple(".".join(filter(None, (self.part, name))) for name in names)

    @property
    def module(self) -> str:
        """The name of the innermost module whose forward runs it."""
        return self.around[-1] if self.around else ""

    @property
    def where(self) -> str:
        """For messages: the operator and the module."""
        return f"{self.name.removeprefix('aten.')} in {self.module or type(self.root).__name__}"

    def constant(self, position: int) -> Tensor | None:
        """The value of a tensor among its arguments that the graph itself holds, if it is one."""
        argument = self.node.args[position]
        return self.constants.get(argument.name) if isinstance(argument, Node) else None

    # -------------------------------------------------------------------------------------------------- what it may say

    def add_layer(
        self, kind: str, weight: Value, bias: Value | None, slots: Sequence[Tensor], extent: Extent,
        groups: int = 1,
    ) -> None:  # fmt: skip
        """Count this call of a convolution or linear layer; `slots` are the labels of its weight's output and input."""
        out_axis, in_axis = (1, 0) if kind == "conv_transpose" else (0, 1)
        name = weight.name or self._origin(weight.shape, dict(zip((out_axis, in_axis), slots, strict=True)))
        if name is None:
            self.uncounted[f"{self.name.removeprefix('aten.')} with a computed weight"] += 1
            return
        extents = (*(self.layers[name].extents if name in self.layers else ()), extent)
        owner, bias_name = name.removesuffix(".weight"), bias.name if bias else None
        computed = weight.name is None
        self.applied[self.node] = name
        self.layers[name] = Layer(owner, kind, name, bias_name, out_axis, in_axis, extents, groups, computed)

    def _origin(self, shape: tuple[int, ...], slots: Mapping[int, Tensor]) -> str | None:
        """The one parameter of this shape, with these labels, from which the weight (argument 1) is computed.

        Of norm and direction of a weight, which may have one shape, the direction.
        """
        seen: set[Node] = set()
        waiting = [self.node.args[1]]
        while waiting:
            node = waiting.pop()
            if isinstance(node, Node) and node not in seen:
                seen.add(node)
                waiting += node.all_input_nodes
        names = {self.names[n.name] for n in seen if n.name in self.names} & self.parameters
        alike = sorted(name for name in names if self.tensors[name].shape == shape)
        starts = {axis: int(labels[0]) for axis, labels in slots.items() if len(labels) > 1}
        if len(alike) > 1 and {name[:-1].rpartition(".")[2] for name in alike} <= {"original", "weight_"}:
            alike = alike[-1:] if len({name[:-1] for name in alike}) == 1 else []
        if len(alike) != 1:
            return None
        if shape[0] == shape[1] and any(self.slots.get((alike[0], axis)) != n for axis, n in starts.items()):
            return None  # its transposed, perhaps
        return alike[0]

    def spell(
        self, path: Path, labels: Tensor, axis: int = 0, span: tuple[int, int] | None = None, *, sign: int = 1,
        offset: int = 0,
    ) -> None:  # fmt: skip
        """The number at `path` of the arguments counts the channels of a field along `axis`, or a `span` of them."""
        trace = str(self.node.meta.get("stack_trace") or "").strip()
        line = next((part for part in reversed(trace.split("\n")) if part.strip().startswith("File ")), "")
        inner = self.modules.get(self.module)
        whole = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
        start, stop = span or (0, len(whole))
        self.spelled.append(
            Spelled(
                self.node, path, whole[start:stop], sign, offset, whole, self.around,
                (line.strip(), self.name, type(inner).__name__), self.where,
            )
        )  # fmt: skip

    def freeze_axes(self, x: Value, axes: Sequence[int], reason: str) -> None:
        """Freeze the fields of `x` that vary along any of `axes`."""
        chosen = {a % x.ndim for a in axes}
        for labels in x.fields:
            if any(labels.shape[a] > 1 for a in chosen):
                self.labels.freeze(labels, reason)

    def sum_over(self, labels: Tensor, zero: bool) -> None:
        """Channels that are summed over: without some of them the sum is the same, if they are `zero` there."""
        reason = f"{self.where} sums over them"
        if zero:
            self.sums.append((labels, reason))
        else:
            self.labels.mark_inexact(labels, reason)

    def pack(self, labels: Tensor) -> None:
        """Channels lie on several axes of a tensor: they must in the end go along one of them."""
        self.packed.append(labels)

    def shuffle(self, labels: Tensor, positions: Tensor) -> None:
        """The graph's own tensor of positions (argument 2) picks from an axis of `labels`, each at most once."""
        self.shuffles.append((cast(Node, self.node.args[2]), labels, positions))

    def has_features(self, labels: Tensor) -> None:
        """The norm that runs now says how many channels it takes, also where it has no parameters to show it."""
        mender = feature_mender(self.modules.get(self.module))
        known = next((before for name, before, _ in self.features if name == self.module), None)
        if known is not None:
            self.labels.unify(known, labels)  # it runs again
        elif mender is not None:
            self.features.append((self.module, labels, mender))


def operator_name(node: Node) -> str:
    """`aten.conv2d` of a node that calls `aten.conv2d.default`."""
    overload = getattr(node.target, "overloadpacket", None)
    return str(overload) if overload is not None else getattr(node.target, "__name__", str(node.target))
