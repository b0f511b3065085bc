"""Trace a model: run its graph on label tensors and read off which channels are coupled to which."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.node import map_arg

from convpare.errors import ConvpareError
from convpare.graph.attributes import tie_attributes
from convpare.graph.batch import batch_numbers
from convpare.graph.capture import Inputs, as_args, capture
from convpare.graph.grouping import aliases, assemble
from convpare.graph.labels import Labels, Value, compact, support
from convpare.graph.normal import normalise
from convpare.graph.parts import Captured, Part, capture_parts
from convpare.graph.probe import settled
from convpare.graph.record import Record
from convpare.graph.rules import RULES
from convpare.graph.rules.common import freeze_values
from convpare.graph.structure import FORMS, Call, Form, Graph
from convpare.graph.tracer import Spelled, Tracer

BEYOND = "beyond which nothing could be captured"
MULTIPLYING = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "lstm", "gru")


def trace(
    model: nn.Module, example_inputs: Inputs, form: Form = "module", *, program: ExportedProgram | None = None
) -> Graph:
    """Which channels of `model` are coupled, which may go, and what each layer costs.

    The model is captured once in evaluation mode by `torch.export`; no weight is read and nothing of it is changed. A
    model that cannot be captured as a whole is run once, and the largest submodules that can be are captured: what lies
    between them stays (`Graph.parts`).

    Args:
        example_inputs: a tensor, or the tuple of tensors that the forward takes. MACs are counted for exactly
            these shapes, batch included; the values do not matter.
        form: what surgery will work on: "module", the module itself with its own forward, whose numbers must come true
            by themselves; "linked", the same, where parts are captured that hand tensors to each other: these channels
            go, too, on the word of whoever asks for it that the forward hands them on whatever its values are, as it
            does on the example; or "graph", the captured graph, in which every number is rewritten.
        program: for the forms that keep the module, the model as `capture` gave it for these inputs, if it is at hand.

    Raises:
        ConvpareError: the model does not run on these inputs, or its forward cannot be captured.
    """
    args = as_args(example_inputs)
    if form in ("module", "linked"):
        return settled(model, read(model, args, program, linked=form == "linked"))
    if form != "graph":
        raise ConvpareError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    program = capture(model, args)
    normal = normalise(program)
    record = Interpreter(model, form, args).run([Part(Call("", args, {}), program)], normal.positions)
    graph = assemble(record)
    return replace(graph, program=program, batched=batch_numbers(model, args, program), folded=normal.folded)


def read(
    model: nn.Module, args: tuple[Tensor, ...], program: ExportedProgram | None = None, linked: bool = False
) -> Record:
    """Capture the model, or the parts of it that can be, and run them on label tensors."""
    whole = None if program is None else Captured((Part(Call("", args, {}), program),))
    captured = whole or capture_parts(model, args, linked)
    interpreter = Interpreter(model, "module", args)
    form: Form = "linked" if linked else "module"
    record = replace(interpreter.run(captured.parts, {}), form=form, recording=captured.recording)
    for name, value in interpreter.t.tensors.items():
        if name in captured.outside:
            freeze_values(interpreter.t, [value], f"{name} is read where nothing could be captured, too")
    return record


class Interpreter:
    """Hands every node of exported graphs to its rule."""

    def __init__(self, model: nn.Module, form: Form, args: Sequence[Tensor]) -> None:
        self.inputs = tuple(tuple(x.shape) for x in args)
        self.aliases = aliases(model)  # a tied parameter stands in the graph once for each of its names
        self.reached: set[str] = set()
        self.values: dict[Node, Any] = {}
        self.given: dict[str, Any] = {}  # inputs of the captured part that an earlier part made
        self.outputs: dict[tuple[int, int], Any] = {}
        self.t = Tracer(model, form)

    def run(self, parts: Sequence[Part], positions: Mapping[str, Tensor]) -> Record:
        t = self.t
        for number, part in enumerate(parts):
            self._enter(part, positions)
            for node in part.program.graph.nodes:
                t.node = node
                self.values[node] = getattr(self, f"_{node.op}")(node)
            self._leave(part, number)
        for labels, reason in t.sums if t.spoiled else ():
            t.labels.mark_inexact(labels, reason)
        settle(t.labels, t.packed)
        spelled = counting(t.labels, t.spelled)
        known = {name: tuple(p.shape) for name, p in t.root.named_parameters() if name not in t.tensors}
        shapes = {name: value.shape for name, value in t.tensors.items()} | known
        parameters = frozenset(name for name, _ in t.root.named_parameters())
        if t.form == "graph":  # holds what it needs, and no more
            parameters &= self.reached
        unreached = [name for name in shapes if name in parameters and name not in self.reached]
        record = Record(
            t.root, t.form, self.inputs, tuple(part.call for part in parts),
            [part.program.constants for part in parts], t.labels, t.slots, shapes, parameters,
            self.values, list(t.layers.values()), spelled, t.shuffles, t.features, frozenset(t.spared),
            dict(t.uncounted), tuple(dict.fromkeys(name.rpartition(".")[0] for name in unreached)), self.outputs,
            frozenset(t.held), t.applied,
        )  # fmt: skip
        tie_attributes(record)
        return record

    def _enter(self, part: Part, positions: Mapping[str, Tensor]) -> None:
        signature = part.program.graph_signature
        lifted = signature.inputs_to_lifted_tensor_constants
        self.t.part = part.call.name
        self.t.constants = {node: part.program.constants[name] for node, name in lifted.items()} | dict(positions)
        prefix = f"{part.call.name}." if part.call.name else ""
        inputs = [spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
        self.given = {inputs[leaf]: self.outputs[made] for leaf, made in part.call.links.items()}
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.t.names = {node: self.aliases.get(prefix + name, prefix + name) for node, name in named.items()}

    def _leave(self, part: Part, number: int) -> None:
        """Channels that come to an end of the network stay; outputs that only later parts read are no end."""
        (node,) = [node for node in part.program.graph.nodes if node.op == "output"]
        specs = part.program.graph_signature.output_specs
        leaves = [x for x, s in zip(self.values[node], specs, strict=True) if s.kind is OutputKind.USER_OUTPUT]
        self.outputs |= {(number, leaf): x for leaf, x in enumerate(leaves)}
        beyond = f"the output of {self.t.part}, {BEYOND}"
        reason = beyond if self.t.part else "the model's output"
        ends = [x for leaf, x in enumerate(leaves) if leaf not in part.call.inner]
        freeze_values(self.t, [x for x in ends if isinstance(x, Value)], reason)

    def _placeholder(self, node: Node) -> Any:
        if node.name in self.given:
            return self.given[node.name]
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        shape = tuple(value.shape)
        name = self.t.names.get(node.name)
        if name is not None or node.name in self.t.constants:
            self.t.held.add(node)
        if name is None:  # an input of the model, or a constant that its forward builds: no channels of the network's
            return Value(shape)
        if node.users:
            self.reached.add(name)
        if name not in self.t.tensors:
            self.t.tensors[name] = self._fresh(name, shape)
        return self.t.tensors[name]

    def _fresh(self, name: str, shape: tuple[int, ...]) -> Value:
        fields = []
        for axis, size in enumerate(shape):
            if size > 1:
                labels = self.t.labels.new(size)
                self.t.slots[name, axis] = int(labels[0])
                fields.append(labels.reshape([-1 if a == axis else 1 for a in range(len(shape))]))
        return Value(shape, tuple(fields), zero=True, name=name)

    def _get_attr(self, node: Node) -> Any:
        self.t.held.add(node)
        value = node.meta.get("val")
        return Value(tuple(value.shape)) if isinstance(value, Tensor) else node.target

    def _call_function(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.target is operator.getitem:
            return cast(Any, args)[0][cast(Any, args)[1]]
        name = self.t.name
        if name.removeprefix("aten.") in MULTIPLYING:
            self.t.uncounted[name.removeprefix("aten.")] += 1
        known = RULES.get(name)
        if known is not None:
            return known(self.t, *args, **kwargs)
        if isinstance(node.target, HigherOrderOperator):  # a block of operators, as `torch.autocast` makes one
            self.t.uncounted[name] += 1
        values = [v for v in _flatten((args, kwargs)) if isinstance(v, Value)]
        shape = "×".join(map(str, values[0].shape)) if values else "no tensor"
        freeze_values(self.t, values, f"no rule for operator {self.t.where} on {shape}")
        return _without_fields(node.meta.get("val"))

    def _output(self, node: Node) -> Any:
        return map_arg(node.args[0], self.values.__getitem__)


def settle(labels: Labels, packed: Sequence[Tensor]) -> None:
    """Channels that still lie on several axes of a tensor go alike along all of these axes but the last."""
    classes = torch.from_numpy(labels.classes())
    for field in packed:
        axes = support(compact(classes[field]))
        if len(axes) > 1:
            first = field
            for axis in axes[:-1]:
                first = first.narrow(axis, 0, 1)
            labels.unify(first, field)
            classes = torch.from_numpy(labels.classes())


def counting(labels: Labels, spelled: Sequence[Spelled]) -> list[Spelled]:
    """The numbers that change with the channels: those of axes along which the channels go in the end."""
    classes = torch.from_numpy(labels.classes())
    found = []
    for number in spelled:
        whole = classes[number.whole]
        if len(whole) > 1 and bool((whole[:1] == whole).all()) and whole.shape[1] > 1:
            continue  # all alike along this axis, channels lie on another one
        found.append(replace(number, labels=number.labels[:, 0], whole=number.whole[:, 0]))
    return found


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
