"""One choice for each of many things under several budgets: the multiple-choice knapsack, solved to optimality."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from convpare.errors import Infeasible

GAP = 1e-6  # relative, at which the search ends
SLACK = 1e-9  # of the largest error: a rounding of the relaxed problem
LARGE = 1e3  # what costs and limits are scaled to: the solver's tolerance of 1e-6 is then a billionth of them
SECONDS = 30.0  # after which the best choice so far is taken


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
    strict = np.asarray(limits, float)
    for tightened in (0.0, 2e-6, 1e-5):  # what the solver takes for within a limit may be above it by a rounding
        at, bound = _solved(costs, errors, strict - tightened * np.abs(strict), below)
        if (sum(c[i] for c, i in zip(costs, at, strict=True)) <= strict).all():
            break
    else:
        raise Infeasible("infeasible: no choice is within the budgets to the last digit; give slightly larger ones")
    error = float(sum(e[i] for e, i in zip(errors, at, strict=True)))
    return Choice(at, error, min(bound, error))


def estimated(costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: Sequence[float]) -> float:
    """The error of a choice within the limits that is near the best; infinite where none was found."""
    if not costs or not limits:
        return choose(costs, errors, limits).error
    costs, errors, scaled, unit = _scaled(costs, errors, np.asarray(limits, float))
    return unit * _relaxed(costs, errors, scaled).known


def _solved(
    costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: np.ndarray, below: float
) -> tuple[tuple[int, ...], float]:
    """The choice, and a bound on the error of all."""
    costs, errors, limits, unit = _scaled(costs, errors, limits)
    relaxed = _relaxed(costs, errors, limits)
    above = min(relaxed.known, below / unit) - relaxed.bound + SLACK
    left = [np.flatnonzero(p - p.min() <= above) for p in relaxed.priced]
    if not all(map(len, left)):
        raise Infeasible(f"no choice within the budgets has an error below {below:.3g}")
    costs, errors = ([x[i] for x, i in zip(given, left, strict=True)] for given in (costs, errors))
    one_each, spent, starts = _rows(costs)
    things = np.ones(len(errors))
    found = milp(  # without its presolve, which has more solutions outside the limits, and prints when it repairs one
        np.concatenate(errors),
        constraints=LinearConstraint(
            vstack([one_each, spent]), [*things, *np.full(len(limits), -np.inf)], [*things, *limits]
        ),
        integrality=np.ones(starts[-1]),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS, "presolve": False},
    )
    if found.x is None:
        raise Infeasible(f"infeasible: no choice is within the budgets ({found.message})")
    at = tuple(int(own[np.argmax(found.x[a:b])]) for own, (a, b) in zip(left, itertools.pairwise(starts), strict=True))
    return at, -np.inf if found.mip_dual_bound is None else float(found.mip_dual_bound) * unit


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """Of the problem in which options can be mixed: its error is below that of all choices.

    Attributes:
        priced: of each thing (options,): errors with the prices of their costs; a choice that holds an option has at
            least as much more error than `bound` as this is above the least one of the thing.
        bound: the error.
        known: the error of a choice, made by taking the cheaper of the options that are mixed; infinite if it is none.
    """

    priced: list[np.ndarray]
    bound: float
    known: float


def _relaxed(costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: np.ndarray) -> _Relaxed:
    one_each, spent, starts = _rows(costs)
    found = linprog(
        np.concatenate(errors), A_ub=spent, b_ub=limits, A_eq=one_each, b_eq=np.ones(len(errors)), bounds=(0, 1)
    )
    if found.x is None:
        raise Infeasible(f"infeasible: no choice is within the budgets ({found.message})")
    prices = -found.ineqlin.marginals
    priced = [e + c @ prices for c, e in zip(costs, errors, strict=True)]
    shares = [found.x[a:b] for a, b in itertools.pairwise(starts)]
    mixed = [np.flatnonzero(x > x.max() / 1e6) for x in shares]
    rounded = [own[c[own].max(1).argmin()] for own, c in zip(mixed, costs, strict=True)]
    room = limits - sum(c[i] for c, i in zip(costs, rounded, strict=True))
    known = _filled(costs, errors, rounded, room) if (room >= 0).all() else math.inf
    return _Relaxed(priced, float(sum(p.min() for p in priced) - prices @ limits), known)


def _scaled(
    costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, float]:
    """The same with costs and limits up to `LARGE` and errors up to 1, and what one of error was."""
    scale = np.maximum(np.max([np.abs(c).max(0) for c in costs], 0), np.maximum(np.abs(limits), 1.0)) / LARGE
    unit = max(*(float(e.max()) for e in errors), 1e-300)
    return [c / scale for c in costs], [e / unit for e in errors], limits / scale, unit


def _filled(costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], at: Sequence[int], room: np.ndarray) -> float:
    """The error of all when things that can take a better option within the room that is left do so, the one that
    gains most first.
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
            return float(sum(e[i] for e, i in zip(errors, at, strict=True)))
        room = room - (costs[n][option] - costs[n][at[n]])
        at[n] = option


def _rows(costs: Sequence[np.ndarray]) -> tuple[csr_array, csr_array, np.ndarray]:
    """The matrices of "one option of each thing" and of what options cost, and where things start in their columns."""
    counts = [len(c) for c in costs]
    starts = np.concatenate([[0], np.cumsum(counts)])
    one_each = csr_array((np.ones(starts[-1]), (np.repeat(np.arange(len(counts)), counts), np.arange(starts[-1]))))
    return one_each, csr_array(np.concatenate(costs).T), starts
