"""One choice for each of many things under several budgets: the multiple-choice knapsack, solved to optimality."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from convpare.errors import Infeasible

GAP = 1e-6  # relative, at which the search ends
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


def choose(costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: Sequence[float]) -> Choice:
    """The options, one of each thing, that have the least error in sum and are within the limits.

    Args:
        costs: of each thing (options, budgets).
        errors: of each thing (options,), not negative.
        limits: (budgets,).

    Raises:
        Infeasible: no choice is within the limits.
    """
    if not costs:
        if any(limit < 0 for limit in limits):
            raise Infeasible("infeasible: there is nothing to choose from, and the budgets are exceeded already")
        return Choice((), 0.0, 0.0)
    strict = np.asarray(limits, float)
    for tightened in (0.0, 2e-6, 1e-5):  # what the solver takes for within a limit may be above it by a rounding
        at, bound = _solved(costs, errors, strict - tightened * np.abs(strict))
        if (sum(c[i] for c, i in zip(costs, at, strict=True)) <= strict).all():
            break
    else:
        raise Infeasible("infeasible: no choice is within the budgets to the last digit; give slightly larger ones")
    error = float(sum(e[i] for e, i in zip(errors, at, strict=True)))
    return Choice(at, error, min(bound, error))


def _solved(
    costs: Sequence[np.ndarray], errors: Sequence[np.ndarray], limits: np.ndarray
) -> tuple[tuple[int, ...], float]:
    """The choice, and a bound on the error of all."""
    counts = [len(e) for e in errors]
    starts = np.concatenate([[0], np.cumsum(counts)])
    one_each = csr_array((np.ones(starts[-1]), (np.repeat(np.arange(len(counts)), counts), np.arange(starts[-1]))))
    scale = np.maximum(np.abs(limits), 1.0)
    spent = csr_array(np.concatenate(costs).T / scale[:, None])
    objective = np.concatenate(errors)
    unit = max(float(objective.max()), 1e-300)
    low = np.concatenate([np.ones(len(counts)), np.full(len(limits), -np.inf)])
    high = np.concatenate([np.ones(len(counts)), limits / scale])
    found = milp(
        objective / unit,
        constraints=LinearConstraint(vstack([one_each, spent]), low, high),
        integrality=np.ones(starts[-1]),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if found.x is None:
        raise Infeasible(f"infeasible: no choice is within the budgets ({found.message})")
    at = tuple(int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(starts))
    return at, -np.inf if found.mip_dual_bound is None else float(found.mip_dual_bound) * unit
