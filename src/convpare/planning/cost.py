"""What a network costs, for any choice of channels: the planner's prediction and the counter are one computation.

MACs are multiply-accumulates of convolutions and linear layers, for the traced example inputs, batch included; biases,
normalisation, activations, pooling and the operators in `Graph.not_counted` are not counted. Parameters exclude
buffers.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from convpare.factorize.edit import Factorize, layout_in
from convpare.graph.capture import Inputs, as_args
from convpare.graph.grouping import assemble
from convpare.graph.structure import Axis, Graph, Layer
from convpare.graph.trace import read


@dataclass(frozen=True)
class Cost:
    """MACs, parameters, and activations (output elements of the counted layers)."""

    macs: int
    params: int
    activations: int

    def __iter__(self) -> Iterator[int]:
        yield from (self.macs, self.params, self.activations)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(*(mine - its for mine, its in zip(self, other, strict=True)))

    def to_json(self) -> dict[str, int]:
        return {"macs": self.macs, "params": self.params, "activations": self.activations}


@dataclass(frozen=True)
class Count:
    """The cost of a network, layer by layer and in total, and what was not counted."""

    total: Cost
    layers: Mapping[str, Cost]
    not_counted: Mapping[str, int]

    def __str__(self) -> str:
        width = max([len(name) for name in self.layers] + [5])
        rows = [f"{'layer':<{width}} {'MACs':>15} {'parameters':>12} {'activations':>12}"]
        for name, cost in [*self.layers.items(), ("total", self.total)]:
            rows.append(f"{name:<{width}} {cost.macs:>15,} {cost.params:>12,} {cost.activations:>12,}")
        if self.not_counted:
            rows.append("not counted: " + ", ".join(f"{name} ×{n}" for name, n in self.not_counted.items()))
        return "\n".join(rows)

    def to_json(self) -> dict[str, object]:
        return {
            **self.total.to_json(),
            "layers": {name: cost.to_json() for name, cost in self.layers.items()},
            "not_counted": dict(self.not_counted),
        }


def count(model: nn.Module, example_inputs: Inputs) -> Count:
    """MACs, parameters and activations of `model` for `example_inputs`, batch included.

    Only what runs in evaluation mode counts towards MACs; parameters are all of the model's, each tied one once. The
    parameters of layers other than convolutions and linear layers stand in the total only.

    Raises:
        ConvpareError: the model does not run on these inputs or cannot be captured.
    """
    return count_graph(assemble(read(model, as_args(example_inputs))))


def count_graph(graph: Graph) -> Count:
    """As `count`, of a model that is traced already."""
    keep = graph.keep_all()
    layers = {layer.name: layer_cost(graph, layer, keep) for layer in graph.layers}
    return Count(total_cost(graph, keep), layers, graph.not_counted)


def prunable_share(graph: Graph, *, marked: bool = False) -> float:
    """The share of the MACs that hang on channels which can be removed: all but those between two fixed ends.

    Args:
        marked: count channels, too, whose removal by nature changes the others.
    """
    barred = np.array([bool(g.inexact) and not marked for g in graph.groups for _ in range(g.channels)] + [True])

    def fixed(axis: Axis) -> float:
        units = graph.units.get(axis)
        return 1.0 if units is None else float(barred[units].mean())

    macs = {layer: layer_cost(graph, layer, graph.keep_all()).macs for layer in graph.layers}
    free = sum(cost * (1 - fixed(layer.out) * fixed(layer.into)) for layer, cost in macs.items())
    return free / max(sum(macs.values()), 1)


def layer_cost(graph: Graph, layer: Layer, keep: np.ndarray) -> Cost:
    """The cost of one layer under the mask `keep` (channels,)."""
    weight = _numel(graph, layer.weight, keep)
    bias = _numel(graph, layer.bias, keep) if layer.bias else 0
    return Cost(layer.positions * weight, weight + bias, layer.outputs * out_channels(graph, layer, keep))


def out_channels(graph: Graph, layer: Layer, keep: np.ndarray) -> int:
    """The output channels of a layer under the mask `keep` (channels,)."""
    slots = len(graph.kept(layer.out, keep))
    if layer.kind != "conv_transpose" or layer.groups == 1:
        return slots
    if graph.shapes[layer.weight][layer.out_axis] > 1:
        return slots * layer.groups
    inputs = graph.shapes[layer.weight][layer.in_axis]  # depthwise: whole groups go
    return len(graph.kept(layer.into, keep)) // (inputs // layer.groups)


def total_cost(graph: Graph, keep: np.ndarray) -> Cost:
    """The cost of the whole network under the mask `keep` (channels,)."""
    layers = [layer_cost(graph, layer, keep) for layer in graph.layers]
    params = sum(_numel(graph, name, keep) for name in graph.parameters)
    return Cost(sum(c.macs for c in layers), params, sum(c.activations for c in layers))


def planned_cost(graph: Graph, keep: np.ndarray, factorizations: Iterable[Factorize] = ()) -> Cost:
    """The cost of the whole network under the mask `keep` (channels,), with these layers as chains after that.

    Raises:
        ConvpareError: there is no such layer, or its kernel cannot take the form.
    """
    cost = total_cost(graph, keep)
    for edit in factorizations:
        layer = graph.layer(edit.layer)
        dense, chain = layer_cost(graph, layer, keep), chain_cost(graph, layer, keep, edit.form, edit.ranks)
        cost = Cost(*(total + new - old for total, new, old in zip(cost, chain, dense, strict=True)))
    return cost


def chain_cost(graph: Graph, layer: Layer, keep: np.ndarray, form: str, ranks: tuple[int, ...]) -> Cost:
    """The cost of one layer as a chain under the mask `keep` (channels,)."""
    layout = layout_in(graph, layer, keep, form, ranks)
    return Cost(layout.macs(layer.extents), layout.params, layout.outputs(layer.extents))


def _numel(graph: Graph, name: str, keep: np.ndarray) -> int:
    numel = 1
    for axis in range(len(graph.shapes[name])):
        numel *= len(graph.kept((name, axis), keep))
    return numel
