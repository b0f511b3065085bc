"""Channels and chains in one choice: the cost of a network whose layers may each be a chain, for any channel counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convpare.graph.structure import Axis, Graph, Layer
from convpare.planning.knapsack import choose
from convpare.planning.options import Chain, dense_cost, value
from convpare.planning.solver import METRICS, CostModel


@dataclass(frozen=True)
class Choices:
    """A layer and what it could become, the most expensive first; the first choice of all is the layer as it is."""

    layer: Layer
    chains: tuple[Chain, ...]


class MixedModel(CostModel):
    """MACs and parameters as a function of the counts of all groups and of what each layer becomes.

    Groups come first, then layers. A layer's levels are its MACs with all channels, as it is and as each of its chains.
    """

    def __init__(self, graph: Graph, choices: Sequence[Choices]) -> None:
        super().__init__(graph)
        self.groups = len(graph.groups)
        self.choices = choices
        number = {axis: i + 1 for i, axis in enumerate(graph.units)}

        def size(axis: Axis) -> tuple[int, float]:
            """Which of the sizes an axis has, and what it is multiplied with."""
            return (number[axis], 1.0) if axis in number else (0, float(graph.shapes[axis[0]][axis[1]]))

        ends = [[size(c.layer.into), size(c.layer.out)] for c in choices]
        self._ends = np.array([[at for at, _ in pair] for pair in ends], int).reshape(-1, 2)
        self._fixed_ends = np.array([[times for _, times in pair] for pair in ends]).reshape(-1, 2)
        self._extra = [_extra(graph, c) for c in choices]  # (choices, metrics, 4): beyond the layer as it is
        self.levels = [self._levels(graph, c) for c in choices]
        self._index = [{float(level): i for i, level in enumerate(levels)} for levels in self.levels]
        touched = [set(np.flatnonzero(column).tolist()) for column in self._slope.toarray().T]
        self._touched = [
            [n for n, pair in enumerate(self._ends) if axes & set(pair.tolist())] for axes in touched
        ]  # of each group the layers that it makes narrower

    def _levels(self, graph: Graph, choices: Choices) -> np.ndarray:
        shape, layer = graph.shapes[choices.layer.weight], choices.layer
        sizes = float(shape[layer.in_axis]), float(shape[layer.out_axis])
        return np.array([value(dense_cost(graph, layer)[0], *sizes), *(value(c.macs, *sizes) for c in choices.chains)])

    def _at(self, kept: np.ndarray) -> list[int]:
        return [index[float(level)] for index, level in zip(self._index, kept[self.groups :], strict=True)]

    def cost(self, kept: np.ndarray) -> dict[str, float]:
        counts = kept[: self.groups]
        base, sizes = super().cost(counts), self._sizes(counts)
        extra = sum((self._beyond(n, i, sizes) for n, i in enumerate(self._at(kept)) if i), np.zeros(len(METRICS)))
        return {metric: base[metric] + float(more) for metric, more in zip(METRICS, extra, strict=True)}

    def saving(self, kept: np.ndarray, group: int, fewer: float) -> dict[str, float]:
        counts, at = kept[: self.groups], self._at(kept)
        sizes = self._sizes(counts)
        if group >= self.groups:
            n = group - self.groups
            target = self._index[n][float(kept[group] - fewer)]
            saved = self._beyond(n, at[n], sizes) - self._beyond(n, target, sizes)
            return {metric: float(x) for metric, x in zip(METRICS, saved, strict=True)}
        base = super().saving(counts, group, int(fewer))
        step = np.zeros(self.groups)
        step[group] = fewer
        after = sizes - self._slope @ step
        layers = [n for n in self._touched[group] if at[n]]
        saved = sum(
            (self._beyond(n, at[n], sizes) - self._beyond(n, at[n], after) for n in layers), np.zeros(len(METRICS))
        )
        return {metric: base[metric] + float(x) for metric, x in zip(METRICS, saved, strict=True)}

    def best_chains(self, counts: np.ndarray, limits: Mapping[str, float]) -> tuple[list[Chain | None], float]:
        """What each layer becomes when the groups keep so many channels (None: it stays as it is), for the least error
        within the limits; and the relative gap within which that is proven.

        Raises:
            Infeasible: no choice is within the limits.
        """
        base, sizes = super().cost(counts), self._sizes(counts)
        at = [METRICS.index(metric) for metric in limits]
        costs = [np.stack([self._beyond(n, i, sizes)[at] for i in range(1 + len(c.chains))])
                 for n, c in enumerate(self.choices)]  # fmt: skip
        errors = [np.array([0.0, *(chain.error for chain in c.chains)]) for c in self.choices]
        found = choose(costs, errors, [limit - base[metric] for metric, limit in limits.items()])
        return [c.chains[i - 1] if i else None for c, i in zip(self.choices, found.at, strict=True)], found.gap

    def _beyond(self, layer: int, choice: int, sizes: np.ndarray) -> np.ndarray:
        """What a layer costs more (less: negative) as one of its choices than as it is, by metric."""
        into, out = sizes[self._ends[layer]] * self._fixed_ends[layer]
        found: np.ndarray = self._extra[layer][choice] @ np.array([1.0, into, out, into * out])
        return found


def _extra(graph: Graph, choices: Choices) -> np.ndarray:
    dense = np.array(dense_cost(graph, choices.layer))
    return np.stack([np.zeros_like(dense), *(np.array((c.macs, c.params)) - dense for c in choices.chains)])


def keep_of(graph: Graph, orders: Mapping[str, np.ndarray], counts: np.ndarray) -> np.ndarray:
    """The mask of channels that stay when each group keeps so many, the first of its order going first."""
    keep = graph.keep_all()
    for group, count in zip(graph.groups, counts, strict=True):
        if count < group.channels:
            keep[group.start + orders[group.name][: group.channels - int(count)]] = False
    return keep
