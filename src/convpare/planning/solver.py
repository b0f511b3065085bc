"""How many channels each group keeps, so that the budgets hold and the predicted error is small."""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from scipy.sparse import csr_array

from convpare.errors import ConvpareError, Infeasible
from convpare.graph.structure import Axis, Graph, Group, Layer

METRICS = ("macs", "params")
AsChain = tuple[str, tuple[int, ...]]  # a form and its ranks
REACH = 4  # levels up and down that an exchange tries
GRAIN = 0.01  # share of the whole error from which on single levels matter


class Times(Protocol):
    """Milliseconds of a network's layers; see `NetworkTimes`."""

    rest: float

    @property
    def timed(self) -> list[Layer]: ...

    def of(self, layer: Layer, chain: AsChain | None, into: int, out: int) -> float: ...


class Ends:
    """The sizes of layers' axes of inputs and outputs, from the sizes of all axes."""

    def __init__(self, graph: Graph, layers: Sequence[Layer], number: Mapping[Axis, int]) -> None:
        ends = [layer.into for layer in layers], [layer.out for layer in layers]
        self._at = np.array([[number.get(axis, 0) for axis in side] for side in ends], int).T.reshape(-1, 2)
        self._times = np.array(
            [[1.0 if a in number else graph.shapes[a[0]][a[1]] for a in side] for side in ends], float
        ).T.reshape(-1, 2)

    def of(self, sizes: np.ndarray) -> np.ndarray:
        """(layers, 2)."""
        return np.asarray(sizes[self._at] * self._times)

    def touched(self, axes: set[int]) -> list[int]:
        """The layers with one of these axes."""
        return [n for n, pair in enumerate(self._at) if axes & set(pair.tolist())]


class CostModel:
    """MACs and parameters as a function of how many channels each group keeps; equal to `total_cost` exactly.

    Every axis has a size that is linear in the counts, every tensor's numel is a product of axis sizes. With the times
    of layers, predicted milliseconds, too ("latency").
    """

    def __init__(self, graph: Graph, times: Times | None = None) -> None:
        number = {axis: i + 1 for i, axis in enumerate(graph.units)}  # axis 0 stands for "no axis", of size 1
        self.metrics = METRICS if times is None else (*METRICS, "latency")
        self._slope = _channels_per_channel(graph)
        self._fixed = np.array([1, *((units < 0).sum() for units in graph.units.values())], float)
        self._names = sorted(graph.parameters)
        variable = [[number[n, a] for a in range(len(graph.shapes[n])) if (n, a) in number] for n in self._names]
        depth = max([1, *map(len, variable)])
        self._axes = np.array([axes + [0] * (depth - len(axes)) for axes in variable]).reshape(-1, depth)
        self._constant = np.array(
            [np.prod([s for a, s in enumerate(graph.shapes[n]) if (n, a) not in number]) for n in self._names]
        )
        positions = {layer.weight: layer.positions for layer in graph.layers}
        self._positions = np.array([positions.get(n, 0) for n in self._names], float)
        columns = self._slope.tocsc()
        parts = [slice(*columns.indptr[g : g + 2]) for g in range(len(graph.groups))]
        self._columns = [(columns.indices[part], columns.data[part]) for part in parts]
        self._affected = [np.flatnonzero(np.isin(self._axes, axes).any(axis=1)) for axes, _ in self._columns]
        self._known = b"", np.zeros(0)  # the sizes that were asked for last
        self._times = times
        self._timed = [] if times is None else times.timed
        self._timed_ends = Ends(graph, self._timed, number)
        self._outputs = np.array([layer.outputs * _copies_of(layer) for layer in graph.layers], float)
        self._all_ends = Ends(graph, graph.layers, number)
        self._timed_touched = [self._timed_ends.touched(set(axes.tolist())) for axes, _ in self._columns]
        self.whole = np.array([g.channels for g in graph.groups], float)
        self._dense_elements = self._elements(self._sizes(self.whole))

    def cost(self, kept: np.ndarray) -> dict[str, float]:
        """The cost when group i keeps `kept[i]` channels."""
        sizes = self._sizes(kept)
        return self._sum(sizes, np.arange(len(self._names))) | self._latency(sizes, range(len(self._timed)))

    def least(self, kept: np.ndarray) -> dict[str, float]:
        """A bound on the cost, metric by metric, when the groups keep at least so many."""
        return self.cost(kept)

    def saving(self, kept: np.ndarray, group: int, fewer: int) -> dict[str, float]:
        """What is saved when `group` keeps `fewer` channels less (negative: more)."""
        rows, (axes, slopes) = self._affected[group], self._columns[group]
        sizes = self._sizes(kept)
        left = sizes.copy()
        left[axes] -= slopes * fewer
        layers = self._timed_touched[group]
        before = self._sum(sizes, rows) | self._latency(sizes, layers)
        after = self._sum(left, rows) | self._latency(left, layers)
        return {metric: before[metric] - after[metric] for metric in self.metrics}

    def _latency(self, sizes: np.ndarray, layers: Iterable[int]) -> dict[str, float]:
        """Milliseconds of these of the timed layers, and of the rest of the network; nothing without times."""
        if self._times is None:
            return {}
        ends = self._timed_ends.of(sizes)
        taken = sum(self._times.of(self._timed[n], None, *whole(ends[n])) for n in layers)
        return {"latency": taken + self._times.rest * self._elements(sizes) / max(self._dense_elements, 1.0)}

    def _elements(self, sizes: np.ndarray) -> float:
        """Output elements of all layers."""
        return float(self._outputs @ self._all_ends.of(sizes)[:, 1])

    def _sizes(self, kept: np.ndarray) -> np.ndarray:
        counts = kept.tobytes()
        if counts != self._known[0]:
            self._known = counts, np.asarray(self._fixed + self._slope @ kept)
        return self._known[1]

    def _sum(self, sizes: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        numel = self._constant[rows] * sizes[self._axes[rows]].prod(axis=1)
        return {"macs": float(self._positions[rows] @ numel), "params": float(numel.sum())}


def whole(ends: np.ndarray) -> tuple[int, int]:
    return max(round(ends[0]), 1), max(round(ends[1]), 1)


def _copies_of(layer: Layer) -> int:
    """Output channels for each index of the weight's axis of outputs."""
    return layer.groups if layer.kind == "conv_transpose" else 1


def _channels_per_channel(graph: Graph) -> csr_array:
    """How many indices of each axis (from row 1 on) one channel of each group stands for: whole numbers."""
    starts = np.array([g.start for g in graph.groups])
    rows, columns = [np.zeros(0, int)], [np.zeros(0, int)]
    for i, units in enumerate(graph.units.values()):
        borne = np.searchsorted(starts, units[units >= 0], side="right") - 1
        rows.append(np.full(len(borne), i + 1))
        columns.append(borne)
    entries = np.concatenate(rows), np.concatenate(columns)
    shape = (len(graph.units) + 1, len(graph.groups))
    slope = csr_array((np.ones(len(entries[0])), entries), shape=shape)  # duplicates add up
    slope.data /= np.array([g.channels for g in graph.groups])[slope.indices]
    return slope


@dataclass(frozen=True)
class Budget:
    """Upper bounds as fractions of the dense cost; None does not bound."""

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        for metric, fraction in self.fractions.items():
            if not 0 < fraction <= 1:
                raise ConvpareError(
                    f"the {metric} budget is {fraction}; expected a fraction of the dense cost above 0 and at most 1, "
                    "0.5 for half"
                )

    @property
    def fractions(self) -> dict[str, float]:
        given = {"macs": self.macs, "params": self.params, "latency": self.latency, "memory": self.memory}
        return {metric: value for metric, value in given.items() if value is not None}

    def approached(self, steps: int) -> Iterator["Budget"]:
        """Budgets from that of the dense network to this one, which comes last, in even steps."""
        for step in range(1, steps):
            yield Budget(**{metric: 1 - (1 - f) * step / steps for metric, f in self.fractions.items()})
        yield self


@dataclass
class Allocation:
    """The state of an allocation: how many channels each group keeps, and which counts it may keep."""

    model: CostModel
    levels: Sequence[np.ndarray]  # allowed counts of each group, descending, from all channels down
    errors: Sequence[np.ndarray]  # predicted error at each level, non-decreasing
    limits: Mapping[str, float]
    at: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.at = np.zeros(len(self.levels), int)

    @cached_property
    def hulls(self) -> list[list[int]]:
        """For each group the vertices of its error's lower convex hull."""
        return [_hull(levels, errors) for levels, errors in zip(self.levels, self.errors, strict=True)]

    @property
    def kept(self) -> np.ndarray:
        return np.array([levels[i] for levels, i in zip(self.levels, self.at, strict=True)], float)

    @property
    def error(self) -> float:
        return float(sum(errors[i] for errors, i in zip(self.errors, self.at, strict=True)))

    def fits(self) -> bool:
        cost = self.model.cost(self.kept)
        return all(cost[metric] <= limit for metric, limit in self.limits.items())


def allocate(allocation: Allocation, exchange: bool = True) -> None:
    """Bring `allocation` within its limits, where they can be met, at a small total error.

    With several limits the price of one against the other is searched over a grid; the plan with the least error wins.
    Where single channels matter, it is then improved by exchanges, if these are wanted.
    """
    found = []
    for prices in price_shares(list(allocation.limits)):
        allocation.at[:] = 0
        _greedy(allocation, prices)
        _fill(allocation)
        found.append((allocation.error, allocation.at.copy(), prices))
    _, allocation.at, prices = min(found, key=lambda plan: plan[0])
    if exchange and allocation.fits():
        _exchange(allocation, prices)


def price_shares(metrics: Sequence[str]) -> list[dict[str, float]]:
    """What the budgets may cost against each other: all shares in eighths, of three budgets in quarters."""
    if len(metrics) < 2:
        return [dict.fromkeys(metrics, 1.0)]
    parts = 8 if len(metrics) == 2 else 4
    return [
        {metric: part / parts for metric, part in zip(metrics, shares, strict=True)}
        for shares in itertools.product(range(parts + 1), repeat=len(metrics))
        if sum(shares) == parts
    ]


def allowed_levels(graph: Graph, round_to: int) -> list[np.ndarray]:
    """Counts that each group may keep, from all down: all, or so many that its layers have multiples of `round_to`."""
    levels = []
    for group in graph.groups:
        step = round_to // math.gcd(round_to, *_copies(graph, group))
        below = np.arange(step, group.channels, step)[::-1]
        below = below[below >= group.least]
        levels.append(np.concatenate([[group.channels], below]))
    return levels


def _copies(graph: Graph, group: Group) -> list[int]:
    """How many output channels of each producer one channel of the group stands for (grouped convolutions: several)."""
    units = [graph.channel_units(graph.layer(name), reads_input=False) for name in group.producers]
    return [int((u == group.start).sum()) for u in units]


def limits_of(model: CostModel, graph: Graph, budget: Budget) -> dict[str, float]:
    """The budgets in units of cost: the largest whole cost whose share of the dense one is within the budget. That of
    memory is none of a sum, and not among them (see `caps`).

    Raises:
        ConvpareError: a budget is on something that the network has none of.
    """
    dense = model.cost(model.whole)
    limits = {}
    for metric, fraction in replace(budget, memory=None).fractions.items():
        if not dense[metric]:
            raise ConvpareError(f"none of the {metric} of {graph.model} can be counted; give another budget")
        if metric == "latency":
            limits[metric] = fraction * dense[metric]
            continue
        near = float(round(fraction * dense[metric]))
        limits[metric] = near if near / dense[metric] <= fraction else near - 1
    return limits


def check_feasible(
    model: CostModel, fewest: np.ndarray, limits: Mapping[str, float], budget: Budget, hint: str = ""
) -> None:
    """Raise when not even the smallest allowed network meets the budgets, and say what it would reach, and a hint.

    Args:
        fewest: the channels that each group must keep.
    """
    least, dense = model.least(fewest), model.cost(model.whole)
    for metric, limit in limits.items():
        if least[metric] > limit:
            share = least[metric] / dense[metric]
            best = math.ceil(1e4 * share) / 1e4
            raise Infeasible(
                f"infeasible: {metric} {budget.fractions[metric]:g} was asked for, at best "
                f"{best if best >= share else best + 1e-4:g} can be reached with every group at its minimum{hint}"
            )


def even_errors(model: CostModel, levels: Sequence[np.ndarray], metrics: Iterable[str]) -> list[np.ndarray]:
    """Errors by which every group loses the same share: (removed share)², weighted by what the whole group costs."""
    dense = np.array([allowed[0] for allowed in levels], float)
    total = model.cost(dense)
    errors = []
    for g, allowed in enumerate(levels):
        whole = model.saving(dense, g, int(allowed[0]))
        weight = sum(whole[m] / total[m] for m in metrics)
        errors.append(weight * (1 - allowed / allowed[0]) ** 2)
    return errors


def _greedy(allocation: Allocation, prices: Mapping[str, float], pinned: int | None = None) -> None:
    """Lower one group after the other, always where the error per saved cost is smallest, until the limits hold.

    Savings only shrink as other groups shrink, so a stale ratio is a lower bound and a heap with lazy updates is exact.
    Each step goes to the next vertex of the lower convex hull of the group's error. The group `pinned` stays.
    """
    hulls = allocation.hulls
    heap = [(-np.inf, g) for g, hull in enumerate(hulls) if g != pinned and allocation.at[g] < hull[-1]]
    heapq.heapify(heap)
    while heap and not allocation.fits():
        _, g = heapq.heappop(heap)
        step = _next(hulls[g], allocation.at[g])
        ratio = _ratio(allocation, g, step, prices)
        if heap and ratio > heap[0][0]:
            heapq.heappush(heap, (ratio, g))
            continue
        allocation.at[g] = step
        if step < hulls[g][-1]:
            heapq.heappush(heap, (_ratio(allocation, g, _next(hulls[g], step), prices), g))


def _ratio(allocation: Allocation, g: int, target: int, prices: Mapping[str, float]) -> float:
    now = allocation.at[g]
    fewer = allocation.levels[g][now] - allocation.levels[g][target]
    saved = allocation.model.saving(allocation.kept, g, fewer)
    useful = sum(price * saved[m] / max(allocation.limits[m], 1) for m, price in prices.items())
    return float((allocation.errors[g][target] - allocation.errors[g][now]) / max(useful, 1e-300))


def _fill(allocation: Allocation, pinned: int | None = None) -> None:
    """Give channels back where they fit, the largest error per cost first, until no single step fits any more.

    The group `pinned` comes last.
    """
    shrunk = set(np.flatnonzero(allocation.at).tolist()) - {pinned}
    while shrunk:
        kept = allocation.kept
        cost = allocation.model.cost(kept)
        refunds = {g: _refund(allocation, g, kept, cost) for g in shrunk}
        shrunk = {g for g, gain in refunds.items() if gain is not None}  # what does not fit now never will again
        if shrunk:
            g = max(shrunk, key=lambda g: refunds[g] or 0.0)
            allocation.at[g] -= 1
            if not allocation.at[g]:
                shrunk.discard(g)
    if pinned is not None:
        _fill(allocation)


def _refund(allocation: Allocation, g: int, kept: np.ndarray, cost: Mapping[str, float]) -> float | None:
    """The error that one level more of `g` takes back per cost, or None where it does not fit."""
    now, up = allocation.at[g], allocation.at[g] - 1
    more = allocation.levels[g][up] - allocation.levels[g][now]
    saved = allocation.model.saving(kept, g, -more)
    if any(cost[m] - saved[m] > limit for m, limit in allocation.limits.items()):
        return None
    share = sum(-saved[m] / max(limit, 1) for m, limit in allocation.limits.items())
    return float((allocation.errors[g][now] - allocation.errors[g][up]) / max(share, 1e-300))


def _exchange(allocation: Allocation, prices: Mapping[str, float]) -> None:
    """Try each group a few levels higher and lower, with the others rearranged around it; keep what is better.

    The greedy misses the optimum by about the error of one level, so this is done only where that is a good part of
    the whole.
    """
    better = True
    while better and _grain(allocation) > GRAIN * allocation.error:
        better = False
        for g, levels in enumerate(allocation.levels):
            start, best, least = allocation.at.copy(), allocation.at.copy(), allocation.error
            for target in range(max(0, start[g] - REACH), min(len(levels), start[g] + REACH + 1)):
                allocation.at[:] = start
                allocation.at[g] = target
                _greedy(allocation, prices, pinned=g)
                if target != start[g] and allocation.fits():
                    _fill(allocation, pinned=g)
                    if allocation.error < least * (1 - 1e-9):
                        best, least, better = allocation.at.copy(), allocation.error, True
            allocation.at[:] = best


def _grain(allocation: Allocation) -> float:
    """The largest error that the last level of a group adds."""
    each = zip(allocation.at, allocation.errors, strict=True)
    return float(max(errors[at] - errors[max(at - 1, 0)] for at, errors in each))


def _next(hull: Sequence[int], at: int) -> int:
    return next(v for v in hull if v > at)


def _hull(levels: np.ndarray, errors: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of error over removed channels."""
    removed = levels[0] - levels
    hull: list[int] = []
    for i in range(len(levels)):
        while len(hull) > 1 and _above(removed, errors, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(x: np.ndarray, y: np.ndarray, a: int, b: int, c: int) -> bool:
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))
