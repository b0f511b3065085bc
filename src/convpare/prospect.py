"""What a plan would save and cost, before anything is changed; and the whole trade-off on the way to a budget."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from convpare.errors import Infeasible
from convpare.notebook import html_table
from convpare.planning.cost import Cost
from convpare.planning.plan import Plan
from convpare.planning.planner import Planner
from convpare.planning.solver import Budget

Tell = Callable[[str, int, int], None]
STEPS = 10


@dataclass(frozen=True, eq=False)
class Prospect:
    """A plan, and what it stands to gain.

    Attributes:
        plan: the plan.
        savings: of each edit beside all others, removals first; see `Plan.savings`.
        prices: of each budget; see `Planner.prices`.
    """

    plan: Plan
    savings: tuple[Cost, ...]
    prices: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        names = [*(e.group for e in self.plan.edits), *(e.layer for e in self.plan.factorizations)]
        return {
            "plan": self.plan.to_json(),
            "error": self.plan.error,
            "prices": dict(self.prices),
            "savings": [{"of": n, **cost.to_json()} for n, cost in zip(names, self.savings, strict=True)],
        }

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        prices = [(metric, f"{price:.2g}") for metric, price in self.prices.items()]
        priced = html_table(("budget", "one % more takes back of the error"), prices) if prices else ""
        return self.plan._repr_html_() + priced


def prospect(planner: Planner, budget: Budget, on_progress: Tell | None = None) -> Prospect:
    """A plan under `budget` with what each of its edits saves and what the budgets cost.

    Raises:
        ConvpareError: as `Planner.plan`.
    """
    tell = on_progress or (lambda *_: None)
    tell("planning", 0, 1)
    made = planner.plan(budget)
    tell("pricing", 0, 1)
    return Prospect(made, tuple(made.savings(planner.graph)), planner.prices(made))


@dataclass(frozen=True, eq=False)
class TradeOff:
    """Plans from the dense network to a budget; None with a reason where a budget is out of reach.

    Attributes:
        before: cost of the dense network.
    """

    model: str
    criterion: str
    before: Cost
    steps: tuple[tuple[Budget, Plan | None, str], ...]

    @property
    def plans(self) -> list[Plan]:
        """Those that there are."""
        return [made for _, made, _ in self.steps if made is not None]

    def to_json(self, plans: bool = True) -> dict[str, Any]:
        """All of it, or without the plans themselves."""
        steps = [
            {
                "requested": budget.fractions,
                "achieved": None if made is None else made.achieved,
                "error": None if made is None else made.error,
                "infeasible": reason or None,
                **({"plan": None if made is None else made.to_json()} if plans else {}),
            }
            for budget, made, reason in self.steps
        ]
        return {"model": self.model, "criterion": self.criterion, "before": self.before.to_json(), "steps": steps}

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        asked = list(self.steps[0][0].fractions)
        rows = []
        for budget, made, reason in self.steps:
            got = [reason, "", ""] if made is None else [*_shares(made), f"{made.error:.3g}"]
            rows.append([*(f"{fraction:.3f}" for fraction in budget.fractions.values()), *got])
        columns = (*(f"{metric} asked" for metric in asked), "MACs", "parameters", "error")
        return html_table(columns, rows, f"predicted errors of {self.model}, criterion {self.criterion}")


def trade_off(
    planner: Planner, budget: Budget, steps: int = STEPS, on_progress: Tell | None = None, *,
    methods: tuple[str, ...] | None = None, exclude: tuple[str, ...] = (),
) -> TradeOff:  # fmt: skip
    """Plans at so many even steps from the dense network to `budget`.

    Args:
        methods, exclude: of `Planner.plan`.

    Raises:
        ConvpareError: as `Planner.plan`, but not where a budget is out of reach.
    """
    tell = on_progress or (lambda *_: None)
    found: list[tuple[Budget, Plan | None, str]] = []
    for part in budget.approached(steps):
        tell("planning", len(found), steps)
        try:
            found.append((part, planner.plan(part, methods=methods, exclude=exclude), ""))
        except Infeasible as reason:
            found.append((part, None, str(reason)))
    return TradeOff(planner.graph.model, planner.statistics.criterion.name, planner.before, tuple(found))


def _shares(made: Plan) -> list[str]:
    return [f"{made.achieved[metric]:.4f}" for metric in ("macs", "params")]
