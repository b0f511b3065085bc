"""Trace a model: run its graph on label tensors and read off which channels are coupled to which."""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from convpare.graph.capture import Inputs, as_args, capture
from convpare.graph.grouping import aliases, assemble
from convpare.graph.labels import Labels, Value
from convpare.graph.mending import mender_for
from convpare.graph.probe import failing_suspects
from convpare.graph.record import Record
from convpare.graph.rules import RULES, freeze_values
from convpare.graph.structure import Axis, Graph, Layer, Mender
from convpare.graph.surgery import BATCH_NORMS, mend_features

MULTIPLYING = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "_weight_norm")


def trace(model: nn.Module, example_inputs: Inputs) -> Graph:
    """Which channels of `model` are coupled, which may go, and what each layer costs.

    The model is captured once in evaluation mode by `torch.export`; no weight is read and nothing of it is changed.

    Args:
        example_inputs: a tensor, or the tuple of tensors that the forward takes. MACs are counted for exactly
            these shapes, batch included; the values do not matter.

    Raises:
        ConvpareError: the model does not run on these inputs, or its forward cannot be captured.
    """
    program = capture(model, example_inputs)
    tracer = Tracer(model, program)
    tracer.run()
    record = tracer.record(tuple(tuple(x.shape) for x in as_args(example_inputs)))
    graph = assemble(record)
    failed = failing_suspects(model, as_args(example_inputs), graph, record)
    for labels, reason in failed:
        record.labels.freeze(labels, reason)
    return assemble(record) if failed else graph


@dataclass
class Tracer:
    """Interprets an exported graph on label tensors. Rules see it as `t`."""

    root: nn.Module
    program: ExportedProgram
    labels: Labels = field(default_factory=Labels)

    def __post_init__(self) -> None:
        self._values: dict[Node, Any] = {}
        self._slots: dict[Axis, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._layers: dict[str, Layer] = {}
        self._mends: list[tuple[str, Tensor, Mender]] = []
        self._suspects: list[tuple[Tensor, str]] = []
        self._uncounted: Counter[str] = Counter()
        signature = self.program.graph_signature
        known = aliases(self.root)  # a tied parameter stands in the graph once for each of its names
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._names = {node: known.get(name, name) for node, name in named.items()}
        self._parameters = frozenset(self._names[node] for node in signature.inputs_to_parameters)
        self._modules = dict(self.root.named_modules(remove_duplicate=False))
        self._tensors: dict[str, Value] = {}
        self._reached: set[str] = set()

    # ------------------------------------------------------------------------------------- what the rules may ask

    @property
    def name(self) -> str:
        """The operator that runs now, without overload: `aten.conv2d`."""
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
    def module(self) -> str:
        """The name of the innermost module whose forward runs it."""
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack else ""

    @property
    def where(self) -> str:
        """For messages: the operator and the module."""
        return f"{self.name.removeprefix('aten.')} in {self.module or type(self.root).__name__}"

    def add_layer(self, kind: str, positions: int, outputs: int, groups: int = 1) -> None:
        """Count this call of a convolution or linear layer. A weight that is computed cannot be counted by its name."""
        name = self._parameter_of(1)
        if name is None:
            self._uncounted[f"{self.name.removeprefix('aten.')} with a computed weight"] += 1
            return
        owner = name.removesuffix(".weight")
        bias_name = self._parameter_of(2)
        known = self._layers.get(name)
        out_axis, in_axis = (1, 0) if kind == "conv_transpose" else (0, 1)
        if known:
            positions, outputs = positions + known.positions, outputs + known.outputs
        self._layers[name] = Layer(owner, kind, name, bias_name, out_axis, in_axis, positions, outputs, groups)

    def freeze_axes(self, x: Value, axes: Sequence[int], reason: str) -> None:
        """Freeze the fields of `x` that vary along any of `axes`."""
        chosen = {a % x.ndim for a in axes}
        for labels in x.fields:
            if any(labels.shape[a] > 1 for a in chosen):
                self.labels.freeze(labels, reason)

    def suspect(self, labels: Tensor, reason: str) -> None:
        """These channels may hang on a number in the forward: a trial surgery will tell."""
        self._suspects.append((labels.reshape(-1), reason))

    def suspect_groups(self, labels: Tensor) -> None:
        """Whole groups of this convolution go: its module's `groups` is mended, a functional call's may not be."""
        if not isinstance(self._modules.get(self.module), nn.modules.conv._ConvNd):
            self.suspect(labels, f"{self.where} takes its groups from a number in the forward")

    def mend_features(self, labels: Tensor) -> None:
        """The norm that runs now says how many channels it takes, also where it has no parameters to show it."""
        if isinstance(self._modules.get(self.module), BATCH_NORMS):
            self._mends.append((self.module, labels, mend_features))

    def mend(self, labels: Tensor) -> bool:
        """Whether the module around this operator can have its numbers mended; `labels` (size,) are its output's."""
        module = self._modules.get(self.module)
        mender = mender_for(module) if module is not None else None
        if mender is None:
            return False
        for name, known, _ in self._mends:
            if self._modules[name] is module:  # it runs again: one module, one set of numbers
                if len(known) != len(labels):
                    return False
                self.labels.unify(known, labels)
                return True
        self._mends.append((self.module, labels, mender))
        return True

    # ---------------------------------------------------------------------------------------------- interpretation

    def run(self) -> None:
        for node in self.program.graph.nodes:
            self.node = node
            self._values[node] = getattr(self, f"_{node.op}")(node)

    def record(self, inputs: tuple[tuple[int, ...], ...]) -> Record:
        unreached = [name for name in self._shapes if name in self._parameters and name not in self._reached]
        return Record(
            self.root, inputs, self.labels, self._slots, self._shapes, self._parameters, list(self._values.values()),
            list(self._layers.values()), self._mends, self._suspects, dict(self._uncounted),
            tuple(dict.fromkeys(name.rpartition(".")[0] for name in unreached)),
        )  # fmt: skip

    def _placeholder(self, node: Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        name = self._names.get(node.name)
        if name is None:  # an input of the model, or a constant that its forward builds: no channels of the network's
            return Value(shape)
        if node.users:
            self._reached.add(name)
        if name in self._tensors:
            return self._tensors[name]
        self._shapes[name] = shape
        fields = []
        for axis, size in enumerate(shape):
            if size > 1:
                labels = self.labels.new(size)
                self._slots[name, axis] = int(labels[0])
                fields.append(labels.reshape([-1 if a == axis else 1 for a in range(len(shape))]))
        self._tensors[name] = Value(shape, tuple(fields))
        return self._tensors[name]

    def _get_attr(self, node: Node) -> Any:
        value = node.meta.get("val")
        return Value(tuple(value.shape)) if isinstance(value, Tensor) else node.target

    def _call_function(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.target is operator.getitem:
            return cast(Any, args)[0][cast(Any, args)[1]]
        if self.name.removeprefix("aten.") in MULTIPLYING:
            self._uncounted[self.name.removeprefix("aten.")] += 1
        known = RULES.get(self.name)
        if known is not None:
            return known(self, *args, **kwargs)
        if isinstance(node.target, HigherOrderOperator):  # a block of operators, as `torch.autocast` makes one
            self._uncounted[self.name] += 1
        values = [v for v in _flatten((args, kwargs)) if isinstance(v, Value)]
        shape = "×".join(map(str, values[0].shape)) if values else "no tensor"
        freeze_values(self, values, f"no rule for operator {self.where} on {shape}")
        return _without_fields(node.meta.get("val"))

    def _output(self, node: Node) -> None:
        outputs = map_arg(node.args, self._values.__getitem__)
        freeze_values(self, [v for v in _flatten(outputs) if isinstance(v, Value)], "the model's output")

    def _parameter_of(self, position: int) -> str | None:
        argument = self.node.args[position] if len(self.node.args) > position else None
        if argument is None:
            argument = self.node.kwargs.get({1: "weight", 2: "bias"}[position])
        return self._names.get(argument.name) if isinstance(argument, Node) else None


def operator_name(node: Node) -> str:
    """`aten.conv2d` of a node that calls `aten.conv2d.default`."""
    overload = getattr(node.target, "overloadpacket", None)
    return str(overload) if overload is not None else getattr(node.target, "__name__", str(node.target))


def _flatten(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for item in tree.values() for leaf in _flatten(item)]
    if isinstance(tree, list | tuple):
        return [leaf for item in tree for leaf in _flatten(item)]
    return [tree]


def _without_fields(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Value(tuple(value.shape))
    if isinstance(value, list | tuple):
        return [_without_fields(item) for item in value]
    return value
