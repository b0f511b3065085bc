"""One choice for each of many things under several budgets: the multiple-choice knapsack, to optimality or a known gap.

The relaxed problem, in which options can be mixed, gives prices. By them most options are in no best choice; those that
are left are put together thing by thing, without what another beats in error and all costs.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

from convpare.errors import Infeasible

SLACK = 1e-9  # of the largest error: a rounding of the relaxed problem
STATES = 20_000  # of so many beginnings of choices at a time the most promising go on
THRESHOLDS = 32  # of costs, by which beginnings are compared where there are several budgets


@dataclass(frozen=True)
class Choice:
    """Which option of each thing is taken, the error of all, and a bound: no choice has less error than `bound`."""

    at: tuple[int, ...]
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the best it may be, relative to its error."""
        return max(0.0, (self.error - self.bound) / self.error) if self.error > 0 else 0.0


def choose(
    costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: Sequence[float], below: float = math.inf
) -> Choice:
    """The options, one of each thing, that have the least error in sum and are within the limits.

    Args:
        costs: of each thing (options, budgets).
        errors: of each thing (options,), not negative.
        limits: (budgets,).
        below: choices with more error than this are of no interest.

    Raises:
        Infeasible: no choice is within the limits, or it is of no interest.
    """
    if not costs:
        if any(limit < 0 for limit in limits):
            raise Infeasible("infeasible: there is nothing to choose from, and the budgets are exceeded already")
        return Choice((), 0.0, 0.0)
    if not limits:
        least = tuple(int(e.argmin()) for e in errors)
        error = float(sum(e.min() for e in errors))
        return Choice(least, error, error)
    relaxed = _Relaxed.of(costs, errors, np.asarray(limits, float))
    found = _searched(costs, errors, np.asarray(limits, float), relaxed, below)
    if not found.at and below == math.inf > found.bound:
        raise Infeasible("no choice within the budgets was found; give slightly larger ones")
    if not found.at or found.error > below:
        wanted = "" if below == math.inf else f" with an error below {below:.3g}"
        raise Infeasible(f"infeasible: no choice is within the budgets{wanted}")
    return found


def estimated(costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: Sequence[float]) -> float:
    """The error of a choice within the limits that is near the best; infinite where none was found.

    Raises:
        Infeasible: there is none, not even of mixed options.
    """
    if not costs or not limits:
        return choose(costs, errors, limits).error
    return _Relaxed.of(costs, errors, np.asarray(limits, float)).error


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """What the relaxed problem tells, errors in units of the largest.

    Attributes:
        priced: of each thing (options,): how much more error than `bound` a choice has at least that holds an option.
        bound: no choice has less error.
        at: a choice within the limits, made by taking the cheaper of the options that are mixed, and then better ones
            where there is room; none where that is none.
        error: of that choice, in its own unit; infinite if there is none.
        unit: the largest error.
    """

    priced: list[np.ndarray]
    bound: float
    at: tuple[int, ...]
    error: float
    unit: float

    @staticmethod
    def of(costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: np.ndarray) -> "_Relaxed":
        counts = [len(e) for e in errors]
        starts = np.concatenate([[0], np.cumsum(counts)])
        each = csr_array((np.ones(starts[-1]), (np.repeat(np.arange(len(counts)), counts), np.arange(starts[-1]))))
        scale = np.maximum(np.max([np.abs(c).max(0) for c in costs], 0), np.maximum(np.abs(limits), 1.0))
        unit = max(*(float(e.max()) for e in errors), 1e-300)
        objective, spent = np.concatenate(errors) / unit, np.concatenate(costs) / scale
        solved = linprog(
            objective, A_ub=csr_array(spent.T), b_ub=limits / scale, A_eq=each, b_eq=np.ones(len(counts)), bounds=(0, 1)
        )
        if solved.x is None:
            raise Infeasible(f"infeasible: no choice is within the budgets ({solved.message})")
        prices = -np.asarray(solved.ineqlin.marginals)
        priced = np.split(objective + spent @ prices, starts[1:-1])
        bound = float(sum(p.min() for p in priced) - prices @ (limits / scale))
        mixed = [np.flatnonzero(x > x.max() / 1e6) for x in np.split(solved.x, starts[1:-1])]
        at = [int(own[(c[own] / scale).max(1).argmin()]) for own, c in zip(mixed, costs, strict=True)]
        room = limits - sum(c[i] for c, i in zip(costs, at, strict=True))
        at = _filled(costs, errors, at, room) if (room >= 0).all() else []
        error = float(sum(e[i] for e, i in zip(errors, at, strict=True))) if at else math.inf
        return _Relaxed([p - p.min() for p in priced], bound, tuple(at), error, unit)


def _filled(
    costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], at: Sequence[int], room: np.ndarray
) -> list[int]:  # fmt: skip
    """The choice, when things that can take a better option within the room that is left do so, the one that gains most
    first.
    """
    at = list(at)
    while True:
        best = [
            (float(e[i] - e[fitting].min()), n, int(fitting[e[fitting].argmin()]))
            for n, (c, e, i) in enumerate(zip(costs, errors, at, strict=True))
            if (fitting := np.flatnonzero((c - c[i] <= room).all(1))).size
        ]
        gain, n, option = max(best)
        if gain <= 0:
            return at
        room = room - (costs[n][option] - costs[n][at[n]])
        at[n] = option


@dataclass(frozen=True, eq=False)
class _Beginnings:
    """Choices of some of the things: what they spend (n, budgets), their error (n,), how much more error than the bound
    the best choices have that begin so (n,), and where each comes from: number of the shorter one · options + option.
    """

    spent: np.ndarray
    error: np.ndarray
    above: np.ndarray
    source: np.ndarray

    def of(self, which: np.ndarray) -> "_Beginnings":
        return _Beginnings(self.spent[which], self.error[which], self.above[which], self.source[which])


def _searched(
    costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: np.ndarray, relaxed: _Relaxed, below: float
) -> Choice:
    """The best choice; its error is infinite where there is none that is at most `below`."""
    room = min(relaxed.error, below) / relaxed.unit - relaxed.bound + SLACK
    left = [np.flatnonzero(p <= room) for p in relaxed.priced]
    lost = math.inf  # how far above the bound the best of those is that were given up
    best = Choice(relaxed.at, relaxed.error, relaxed.error)
    if all(map(len, left)):
        order = sorted(range(len(left)), key=lambda n: len(left[n]))
        least = np.array([costs[n][left[n]].min(0) for n in order])
        after = np.concatenate([np.cumsum(least[::-1], 0)[::-1], np.zeros((1, len(limits)))])
        now = _Beginnings(np.zeros((1, len(limits))), np.zeros(1), np.zeros(1), np.zeros(1, int))
        sources = []
        for number, n in enumerate(order):
            own = left[n]
            above = (now.above[:, None] + relaxed.priced[n][own]).ravel()
            source = np.flatnonzero(above <= room)
            before, option = np.divmod(source, len(own))
            spent = now.spent[before] + costs[n][own[option]]
            error = now.error[before] + errors[n][own[option]] / relaxed.unit
            fits = (spent + after[number + 1] <= limits).all(1)
            now = _Beginnings(spent, error, above[source], source).of(fits)
            for most, compared in ((8 * STATES, True), (STATES, False)):
                now, given_up = _nearest(now, most)
                lost = min(lost, given_up)
                now = now.of(_undominated(now)) if compared else now
            sources.append(now.source)
        if len(now.error) and (error_ := float(now.error.min()) * relaxed.unit) < best.error:
            best = Choice(_traced(order, left, sources, int(now.error.argmin())), error_, error_)
    return Choice(best.at, best.error, min(best.error, (relaxed.bound + lost) * relaxed.unit))


def _traced(
    order: Sequence[int], left: Sequence[np.ndarray], sources: Sequence[np.ndarray], last: int
) -> tuple[int, ...]:  # fmt: skip
    """The options of the choice that ends there."""
    at = [0] * len(order)
    for n, source in zip(reversed(order), reversed(sources), strict=True):
        last, option = divmod(int(source[last]), len(left[n]))
        at[n] = int(left[n][option])
    return tuple(at)


def _nearest(now: _Beginnings, most: int) -> tuple[_Beginnings, float]:
    """So many beginnings that are nearest to the bound, and how far above it the nearest of the others is."""
    if len(now.error) <= most:
        return now, math.inf
    order = np.argpartition(now.above, most)
    return now.of(order[:most]), float(now.above[order[most:]].min())


def _undominated(now: _Beginnings) -> np.ndarray:
    """Which beginnings stay when those go than which another is no worse in error and all costs; by thresholds of the
    second cost on where there are several, so that some may be overlooked.
    """
    order = np.lexsort((now.error, *now.spent.T[::-1]))
    others, error = now.spent[order, 1:], now.error[order]
    stays = np.ones(len(order), bool)
    steps = round(THRESHOLDS ** (1 / max(others.shape[1], 1)))
    grid = np.quantile(others, np.linspace(0, 1, steps + 1)[1:-1], axis=0) if others.size else others
    for threshold in itertools.product(*grid.T):
        low, high = (others <= threshold).all(1), (others > threshold).all(1)
        least = np.minimum.accumulate(np.where(low, error, np.inf))
        before = np.concatenate([[np.inf], least[:-1]])
        stays &= ~((before <= error) & (high if others.shape[1] else True))
    return order[stays]
