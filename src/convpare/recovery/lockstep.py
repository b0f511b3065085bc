"""Run a captured network operator by operator over a list of batches that stay in memory."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from convpare.errors import ConvpareError
from convpare.graph.capture import capture
from convpare.graph.grouping import aliases
from convpare.graph.tracer import operator_name


class Run:
    """A captured network that advances one operator at a time, each over all batches (of one size).

    Values are freed after their last use. Parameters are the module's own tensors: who changes them changes the run.
    `nodes` are the operators in the order of execution, `tensors` the names of parameters and buffers in the graph (of
    tied ones their first name), `uses` says how many operators read each.
    """

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        program = capture(model, batches[0])
        self.nodes: list[Node] = [n for n in program.graph.nodes if n.op == "call_function"]
        self.position = {node: number for number, node in enumerate(self.nodes)}
        self.done = 0
        self.tensors: dict[Node, str] = {}
        self._count = len(batches)
        self._values: dict[Node, list[Any]] = {}
        self._snapshots: dict[Node, list[Any] | None] = {}
        self._last_use: dict[Node, int] = {}
        for number, node in enumerate(self.nodes):
            self._last_use.update(dict.fromkeys(node.all_input_nodes, number))
        signature = program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        own.update(model.named_buffers(remove_duplicate=False))
        tied = aliases(model)
        for node in program.graph.nodes:
            if node.op == "get_attr":
                raise ConvpareError(f"the forward has a nested graph ({node.target}), which cannot be run step by step")
            if node.op == "placeholder" and node.name in named:
                self.tensors[node] = tied.get(named[node.name], named[node.name])
                self._values[node] = [own[named[node.name]].detach()] * self._count
            elif node.op == "placeholder":
                self._values[node] = self._input(program, node, batches)
        read = [self.tensors[a] for node in self.nodes for a in node.all_input_nodes if a in self.tensors]
        self.uses = Counter(read)

    def _input(self, program: torch.export.ExportedProgram, node: Node, batches: list[Tensor]) -> list[Any]:
        signature = program.graph_signature
        if node.name in signature.inputs_to_lifted_tensor_constants:
            return [program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]] * self._count
        if signature.user_inputs.index(node.name):
            raise ConvpareError("the model takes several inputs; calibration images can be fed to models with one")
        return [batch.clone() for batch in batches]  # the forward may change its input in place

    def value(self, node: Node) -> list[Any]:
        """The value of a node that was run, one for each batch, or the snapshot of it that was asked for."""
        snapshot = self._snapshots.get(node)
        return self._values[node] if snapshot is None else snapshot

    def snapshot(self, nodes: Collection[Node]) -> None:
        """Copy the values of these nodes when they come, so that later operators neither change nor free them."""
        self._snapshots.update(dict.fromkeys(nodes))

    def forget(self, node: Node) -> None:
        """Free the snapshot of a node."""
        self._snapshots.pop(node, None)

    def advance(self, to: int) -> None:
        """Run the operators up to and without number `to`."""
        with torch.no_grad():
            while self.done < to:
                self._step(self.nodes[self.done])
                self.done += 1

    def _step(self, node: Node) -> None:
        call: Callable[..., Any] = node.target  # type: ignore[assignment]
        results = []
        for i in range(self._count):
            args, kwargs = map_arg((node.args, node.kwargs), {a: self._values[a][i] for a in node.all_input_nodes}.get)
            results.append(call(*args, **kwargs))
        self._values[node] = results
        if node in self._snapshots:
            self._snapshots[node] = [r.clone() for r in results]
        for used in node.all_input_nodes:
            if self._last_use[used] == self.done and used not in self.tensors:
                self._values.pop(used, None)


def aligned(
    teacher: Run, student: Run, chains: Collection[str] = (), by_weights: bool = False
) -> dict[Node, Node]:  # fmt: skip
    """The teacher's node for every node of the student.

    Of the layers in `chains`, which the student has as several layers in a row, the last operators are one pair.

    Args:
        by_weights: an operator is that of a layer whose weight it reads (as in the graph form), not whose module runs
            it.

    Raises:
        ConvpareError: apart from these layers the two networks run different operators.
    """
    left, right = (_spine(run, chains, by_weights) for run in (teacher, student))
    if [operator_name(n) for n in left] != [operator_name(n) for n in right]:
        raise ConvpareError(
            f"the compressed network runs other operators than the original ({len(right)} and {len(left)} of them), so "
            "that its layers cannot be fitted to the original's; choose batch-norm recalibration"
        )
    return dict(zip(right, left, strict=True))


def _spine(run: Run, chains: Collection[str], by_weights: bool) -> list[Node]:
    """The nodes in their order, of each stretch inside one of these layers the last one."""
    labelled = [(_reads(run, node, chains) if by_weights else _layer_of(node, chains), node) for node in run.nodes]
    after: list[str | None] = [label for label, _ in labelled[1:]]
    return [node for (label, node), later in zip(labelled, [*after, None], strict=True) if not label or label != later]


def _reads(run: Run, node: Node, chains: Collection[str]) -> str | None:
    names = [run.tensors[a] for a in node.all_input_nodes if a in run.tensors]
    return next((layer for layer in chains for name in names if name.startswith(f"{layer}.")), None)


def _layer_of(node: Node, chains: Collection[str]) -> str | None:
    stack = node.meta.get("nn_module_stack") or {}
    names = (str(path).partition("@")[0] for path, _ in stack.values())
    return next((name for name in names if name in chains), None)
