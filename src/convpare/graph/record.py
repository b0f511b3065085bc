"""What a tracer saw, from which groups are assembled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from convpare.graph.labels import Labels
from convpare.graph.links import Recording
from convpare.graph.structure import Axis, Call, Form, Layer, Mender
from convpare.graph.tracer import Spelled


@dataclass
class Record:
    """Everything that a tracer saw, for `assemble`."""

    model: nn.Module
    form: Form
    inputs: tuple[tuple[int, ...], ...]
    calls: tuple[Call, ...]  # what was captured
    constants: Sequence[Mapping[str, Tensor]]  # of each captured part: the tensors that the forward wrote out
    labels: Labels
    slots: Mapping[Axis, int]  # first label of every axis of every parameter and buffer
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    values: Mapping[Node, Any]  # of every node of the graph, in its order
    layers: Sequence[Layer]
    spelled: Sequence[Spelled]  # numbers in the graph that count channels
    shuffles: Sequence[tuple[Node, Tensor, Tensor]]
    features: Sequence[tuple[str, Tensor, Mender]]  # norms and the labels of what they normalise
    spared: frozenset[Axis]  # what the zeroed network keeps, lest it divides by zero
    not_counted: Mapping[str, int]
    unreached: tuple[str, ...]
    outputs: Mapping[tuple[int, int], Any]  # of each captured part: the leaves of its output
    held: frozenset[Node]  # weights, buffers and constants among the nodes
    applied: Mapping[Node, str]  # node → the weight of the layer whose call it is
    recording: Recording | None = None  # of what runs around the parts

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self.number = {graph: n for n, graph in enumerate(dict.fromkeys(node.graph for node in self.values))}

    def name_of(self, node: Node) -> str:
        """The name of a node, which several captured parts may each have one of."""
        number = self.number[node.graph]
        return f"{number}.{node.name}" if number else node.name
