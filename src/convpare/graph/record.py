"""What a tracer saw, from which groups are assembled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convpare.graph.labels import Labels
from convpare.graph.structure import Axis, Layer, Mender


@dataclass
class Record:
    """Everything that a tracer saw, for `assemble`."""

    model: nn.Module
    inputs: tuple[tuple[int, ...], ...]
    labels: Labels
    slots: Mapping[Axis, int]  # first label of every axis of every parameter and buffer
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    values: Sequence[Any]  # of every node of the graph, in its order
    layers: Sequence[Layer]
    mends: Sequence[tuple[str, Tensor, Mender]]
    suspects: Sequence[tuple[Tensor, str]]
    not_counted: Mapping[str, int]
    unreached: tuple[str, ...]
