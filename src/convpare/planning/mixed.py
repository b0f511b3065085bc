"""Channels and chains in one choice: the cost of a network whose layers may each be a chain, for any channel counts."""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convpare.errors import Infeasible
from convpare.graph.structure import Graph, Layer
from convpare.planning.knapsack import choose, estimated
from convpare.planning.options import Chain, dense_cost
from convpare.planning.solver import CostModel, Ends, Times, price_shares, whole

HALVINGS = 18  # of the range of prices
SWEEPS = 4  # over all groups, at one price
TRIED = 33  # levels of a group


@dataclass(frozen=True)
class Choices:
    """A layer and what it could become; choice 0 is the layer as it is, choice 1 its first chain."""

    layer: Layer
    chains: tuple[Chain, ...]


class MixedModel(CostModel):
    """MACs, parameters and latency as a function of how many channels groups keep and of what each layer becomes."""

    def __init__(self, graph: Graph, choices: Sequence[Choices], times: Times | None = None) -> None:
        super().__init__(graph, times)
        self.choices = choices
        number = {axis: i + 1 for i, axis in enumerate(graph.units)}
        self._ends = Ends(graph, [c.layer for c in choices], number)
        self._extra = [_extra(graph, c) for c in choices]  # (choices, metrics, 4): beyond the layer as it is
        self._taken: dict[tuple[int, int, int], np.ndarray] = {}
        # of each group, layers that it makes narrower
        self._touched = [self._ends.touched(set(axes.tolist())) for axes, _ in self._columns]

    def with_chains(self, kept: np.ndarray, at: Sequence[int]) -> dict[str, float]:
        """The cost when groups keep so many channels and layers become these of their choices (0: as they are)."""
        base, sizes = self.cost(kept), self._sizes(kept)
        extra = self._summed(self._costs(n, sizes)[i] for n, i in enumerate(at))
        return {metric: base[metric] + float(more) for metric, more in zip(self.metrics, extra, strict=True)}

    def least(self, kept: np.ndarray) -> dict[str, float]:
        base, sizes = self.cost(kept), self._sizes(kept)
        extra = self._summed(self._costs(n, sizes).min(0) for n in range(len(self.choices)))
        return {metric: base[metric] + float(more) for metric, more in zip(self.metrics, extra, strict=True)}

    def _summed(self, costs: Iterable[np.ndarray]) -> np.ndarray:
        return sum(costs, np.zeros(len(self.metrics)))

    def best_chains(
        self, counts: np.ndarray, limits: Mapping[str, float], below: float = math.inf
    ) -> tuple[list[Chain | None], float]:
        """What each layer becomes when the groups keep so many channels (None: it stays as it is), for the least error
        within the limits; and the relative gap within which that is proven.

        Raises:
            Infeasible: no choice is within the limits with an error below that.
        """
        found = choose(*self._problem(counts, limits), below)
        return [c.chains[i - 1] if i else None for c, i in zip(self.choices, found.at, strict=True)], found.gap

    def _problem(
        self, counts: np.ndarray, limits: Mapping[str, float]
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
        """Costs and errors of what each layer could become, and what is left of the limits."""
        base, sizes = self.cost(counts), self._sizes(counts)
        at = [self.metrics.index(metric) for metric in limits]
        costs = [self._costs(n, sizes)[:, at] for n in range(len(self.choices))]
        return costs, [_errors(c) for c in self.choices], [limit - base[m] for m, limit in limits.items()]

    def priced(
        self, levels: Sequence[np.ndarray], curves: Sequence[np.ndarray], limits: Mapping[str, float]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """How many channels each group keeps, so that with the best chains the limits hold, and the prices (metrics,)
        of what they cost; None where none is found.

        Lagrangian: with a price on every cost, one group after the other takes the count at which its error, and what
        it and its layers cost with their best chains for that count, are least together. The lowest price that meets
        the limits is searched, and where there are several limits the price of one against the other. Of the most
        promising counts on the way the best is taken, by good chains for each.

        Args:
            levels: the counts that each group may keep, all channels first.
            curves: the error of each.
        """
        searched = [self._around_the_price(levels, curves, limits, shares) for shares in price_shares(list(limits))]
        searched.sort(key=lambda pair: -pair[0])
        candidates = {at: prices for _, seen in searched[:2] for at, prices in seen}
        best = None
        for at, prices in candidates.items():
            counts = np.array([allowed[i] for allowed, i in zip(levels, at, strict=True)], float)
            with contextlib.suppress(Infeasible):
                error = sum(float(curve[i]) for curve, i in zip(curves, at, strict=True))
                error += estimated(*self._problem(counts, limits))
                if best is None or error < best[0]:
                    best = error, counts, prices
        return None if best is None else best[1:]

    def promising(self, counts: np.ndarray, prices: np.ndarray) -> dict[str, set[str]]:
        """For each layer the forms that it may take at these prices when the groups keep so many channels.

        Known are the errors of chains of the whole layer. Those of the narrower one are taken for at least half of the
        share of them that is its share of the kernel.
        """
        sizes, found = self._sizes(counts), {}
        left = self._ends.of(sizes).prod(1) / self._ends.of(self._sizes(self.whole)).prod(1)
        for n, own in enumerate(self.choices):
            spent, errors = self._costs(n, sizes) @ prices, _errors(own)
            near = spent + left[n] / 2 * errors <= (spent + errors).min()
            found[own.layer.name] = {c.form for c, taken in zip(own.chains, near[1:], strict=True) if taken}
        return found

    def _around_the_price(
        self, levels: Sequence[np.ndarray], curves: Sequence[np.ndarray], limits: Mapping[str, float],
        shares: Mapping[str, float],
    ) -> tuple[float, list[tuple[tuple[int, ...], np.ndarray]]]:  # fmt: skip
        """A bound on the error of all choices (Lagrange's dual: prices in the right ratio have the highest), and what
        groups keep on both sides of the price from which on the limits hold, with the prices (metrics,).
        """
        share = np.array([shares.get(m, 0.0) for m in self.metrics])
        limit = np.array([limits.get(m, 1.0) for m in self.metrics])
        asked = np.isin(self.metrics, list(limits))
        worst = sum(float(curve[-1]) for curve in curves) + sum(float(_errors(c).max()) for c in self.choices)
        low, high, dual = 1e-9 * worst, 1e3 * worst, -math.inf
        within: tuple[tuple[int, ...], np.ndarray] | None = None
        beyond: tuple[tuple[int, ...], np.ndarray] | None = None
        at = [0] * len(levels)
        for _ in range(HALVINGS):
            price = math.sqrt(low * high)
            prices = price * share / limit
            at, error, cost = self._descended(levels, curves, prices, at)
            excess = (cost - limit) / limit
            dual = max(dual, error + price * float(share @ excess))
            if (excess[asked] <= 0).all():
                high, within = price, (tuple(at), prices)
            else:
                low, beyond = price, (tuple(at), prices)
        return dual, [seen for seen in (within, beyond) if seen is not None]

    def _descended(
        self, levels: Sequence[np.ndarray], curves: Sequence[np.ndarray], price: np.ndarray, start: Sequence[int]
    ) -> tuple[list[int], float, np.ndarray]:
        """The levels to which no group prefers another at these prices, with the error and cost of all."""
        at = list(start)
        sizes = self._sizes(np.array([allowed[i] for allowed, i in zip(levels, at, strict=True)], float))
        slope = self._slope.toarray()
        for _ in range(SWEEPS):
            before = list(at)
            for g in (g for g, allowed in enumerate(levels) if len(allowed) > 1):
                tried = _some(len(levels[g]))
                others = sizes + np.outer(levels[g][tried] - levels[g][at[g]], slope[:, g])  # (tried, axes)
                values = curves[g][tried] + self._spent(others, g) @ price
                for n in self._touched[g]:
                    values += (self._choice_costs(n, others) @ price + _errors(self.choices[n])).min(1)
                best = int(values.argmin())
                at[g], sizes = tried[best], others[best]
            if at == before:
                break
        kept = np.array([allowed[i] for allowed, i in zip(levels, at, strict=True)], float)
        base = self.cost(kept)
        total = np.array([base[metric] for metric in self.metrics])
        error = sum(float(curve[i]) for curve, i in zip(curves, at, strict=True))
        for n, own in enumerate(self.choices):
            costs, errors = self._costs(n, sizes), _errors(own)
            best = int(np.argmin(costs @ price + errors))
            total, error = total + costs[best], error + float(errors[best])
        return at, error, total

    def _spent(self, sizes: np.ndarray, group: int) -> np.ndarray:
        """What all that a group touches costs at some sizes of the axes (tried, axes); (tried, metrics)."""
        rows = self._affected[group]
        numel = self._constant[rows] * sizes[:, self._axes[rows]].prod(axis=2)
        spent = [numel @ self._positions[rows], numel.sum(axis=1)]
        if self._times is not None:
            layers = self._timed_touched[group]
            spent.append(np.array([self._latency(own, layers)["latency"] for own in sizes]))
        return np.stack(spent, axis=1)

    def _costs(self, layer: int, sizes: np.ndarray) -> np.ndarray:
        """What each choice costs more than the layer as it is, (choices, metrics)."""
        found: np.ndarray = self._choice_costs(layer, sizes[None])[0]
        return found

    def _choice_costs(self, layer: int, sizes: np.ndarray) -> np.ndarray:
        """The same at some sizes of the axes (tried, axes); (tried, choices, metrics)."""
        ends = np.stack([self._ends.of(own)[layer] for own in sizes])
        into, out = ends.T
        bilinear = np.stack([np.ones_like(into), into, out, into * out], axis=1)
        costs: np.ndarray = np.einsum("cmb,tb->tcm", self._extra[layer], bilinear)
        if self._times is None:
            return costs
        return np.concatenate(
            [costs, np.stack([self._slower(layer, *whole(pair)) for pair in ends])[..., None]], axis=2
        )

    def _slower(self, layer: int, into: int, out: int) -> np.ndarray:
        """How many milliseconds each choice takes more than the layer as it is, (choices,)."""
        if (layer, into, out) not in self._taken:
            assert self._times is not None
            own = self.choices[layer]
            chains = [None, *((chain.form, (chain.rank,)) for chain in own.chains)]
            taken = np.array([self._times.of(own.layer, chain, into, out) for chain in chains])
            self._taken[layer, into, out] = taken - taken[0]
        return self._taken[layer, into, out]


def _some(levels: int) -> list[int]:
    """Of so many levels those that are tried: all, or some evenly spread."""
    return sorted({round(i) for i in np.linspace(0, levels - 1, min(levels, TRIED))})


def _errors(choices: Choices) -> np.ndarray:
    return np.array([0.0, *(chain.error for chain in choices.chains)])


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
