"""Channels and chains in one choice: the cost of a network whose layers may each be a chain, for any channel counts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from convpare.graph.structure import Graph, Layer
from convpare.planning.knapsack import choose
from convpare.planning.options import Chain, dense_cost
from convpare.planning.solver import CostModel, Ends, Times, whole


@dataclass(frozen=True)
class Choices:
    """A layer and what it could become, the most expensive first; the first choice of all is the layer as it is."""

    layer: Layer
    chains: tuple[Chain, ...]


class MixedModel(CostModel):
    """MACs, parameters and latency as a function of the counts of all groups and of what each layer becomes.

    Groups come first, then layers. A layer's levels are what it costs with all channels, as it is and as each chain
    that no other beats in cost and error; costs in several units add up by their prices.

    Attributes:
        levels: of each layer, the most expensive first.
        errors: of each layer at each level.
        front: of each layer at each level which of its choices that is: 0 as it is, 1 its first chain, …
    """

    def __init__(
        self,
        graph: Graph,
        choices: Sequence[Choices],
        times: Times | None = None,
        prices: Mapping[str, float] = MappingProxyType({"macs": 1.0}),
    ) -> None:
        super().__init__(graph, times)
        self.groups = len(graph.groups)
        self.choices = choices
        number = {axis: i + 1 for i, axis in enumerate(graph.units)}
        self._ends = Ends(graph, [c.layer for c in choices], number)
        self._extra = [_extra(graph, c) for c in choices]  # (choices, metrics, 4): beyond the layer as it is
        sizes = self._sizes(np.array([g.channels for g in graph.groups], float))
        price = np.array([prices.get(metric, 0.0) for metric in self.metrics])
        fronts = [_front(self._costs(n, sizes) @ price, _errors(c)) for n, c in enumerate(choices)]
        self.front = [at for at, _ in fronts]
        self.levels = [levels for _, levels in fronts]
        self.errors = [_errors(c)[at] for c, at in zip(choices, self.front, strict=True)]
        self._choice = [
            {float(level): int(i) for level, i in zip(levels, at, strict=True)}
            for levels, at in zip(self.levels, self.front, strict=True)
        ]
        touched = [set(np.flatnonzero(column).tolist()) for column in self._slope.toarray().T]
        self._touched = [self._ends.touched(axes) for axes in touched]  # of each group, layers that it makes narrower

    def _at(self, kept: np.ndarray) -> list[int]:
        return [choice[float(level)] for choice, level in zip(self._choice, kept[self.groups :], strict=True)]

    def cost(self, kept: np.ndarray) -> dict[str, float]:
        counts = kept[: self.groups]
        base, sizes = super().cost(counts), self._sizes(counts)
        extra = self._summed(self._beyond(n, i, sizes) for n, i in enumerate(self._at(kept)) if i)
        return {metric: base[metric] + float(more) for metric, more in zip(self.metrics, extra, strict=True)}

    def least(self, kept: np.ndarray) -> dict[str, float]:
        base, sizes = super().cost(kept[: self.groups]), self._sizes(kept[: self.groups])
        extra = self._summed(self._costs(n, sizes).min(0) for n in range(len(self.choices)))
        return {metric: base[metric] + float(more) for metric, more in zip(self.metrics, extra, strict=True)}

    def saving(self, kept: np.ndarray, group: int, fewer: float) -> dict[str, float]:
        counts, at = kept[: self.groups], self._at(kept)
        sizes = self._sizes(counts)
        if group >= self.groups:
            n = group - self.groups
            target = self._choice[n][self._nearest(n, kept[group] - fewer)]
            saved = self._beyond(n, at[n], sizes) - self._beyond(n, target, sizes)
            return {metric: float(x) for metric, x in zip(self.metrics, saved, strict=True)}
        base = super().saving(counts, group, int(fewer))
        step = np.zeros(self.groups)
        step[group] = fewer
        after = sizes - self._slope @ step
        layers = [n for n in self._touched[group] if at[n]]
        saved = self._summed(self._beyond(n, at[n], sizes) - self._beyond(n, at[n], after) for n in layers)
        return {metric: base[metric] + float(x) for metric, x in zip(self.metrics, saved, strict=True)}

    def _summed(self, costs: Iterable[np.ndarray]) -> np.ndarray:
        return sum(costs, np.zeros(len(self.metrics)))

    def best_chains(self, counts: np.ndarray, limits: Mapping[str, float]) -> tuple[list[Chain | None], float]:
        """What each layer becomes when the groups keep so many channels (None: it stays as it is), for the least error
        within the limits; and the relative gap within which that is proven.

        Raises:
            Infeasible: no choice is within the limits.
        """
        base, sizes = super().cost(counts), self._sizes(counts)
        at = [self.metrics.index(metric) for metric in limits]
        costs = [self._costs(n, sizes)[:, at] for n in range(len(self.choices))]
        found = choose(
            costs, [_errors(c) for c in self.choices], [limit - base[metric] for metric, limit in limits.items()]
        )
        return [c.chains[i - 1] if i else None for c, i in zip(self.choices, found.at, strict=True)], found.gap

    def _nearest(self, layer: int, level: float) -> float:
        levels = self.levels[layer]
        return float(levels[np.abs(levels - level).argmin()])

    def _costs(self, layer: int, sizes: np.ndarray) -> np.ndarray:
        """What each choice costs more than the layer as it is, (choices, metrics)."""
        return np.stack([self._beyond(layer, i, sizes) for i in range(1 + len(self.choices[layer].chains))])

    def _beyond(self, layer: int, choice: int, sizes: np.ndarray) -> np.ndarray:
        """What a layer costs more (less: negative) as one of its choices than as it is, by metric."""
        into, out = self._ends.of(sizes)[layer]
        found: np.ndarray = self._extra[layer][choice] @ np.array([1.0, into, out, into * out])
        if self._times is None:
            return found
        own, ends = self.choices[layer], whole(np.array([into, out]))
        chain = (own.chains[choice - 1].form, (own.chains[choice - 1].rank,)) if choice else None
        slower = self._times.of(own.layer, chain, *ends) - self._times.of(own.layer, None, *ends)
        return np.array([*found, slower])


def _errors(choices: Choices) -> np.ndarray:
    return np.array([0.0, *(chain.error for chain in choices.chains)])


def _front(costs: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The choices that no other beats in cost and error, the most expensive (and the layer as it is) first; costs."""
    front: list[int] = []
    for i in np.lexsort((errors, costs)):
        if not front or errors[i] < errors[front[-1]]:
            front.append(int(i))
    if front[-1]:  # a chain has no error, and is cheaper
        front.append(0)
    at = np.array(front[::-1])
    return at, costs[at]


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
