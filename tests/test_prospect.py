"""What a plan would save and cost: against plans without an edit, and with more budget."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convpare
from convpare.errors import ConvpareError, Infeasible
from convpare.importance import get_criterion
from convpare.planning import statistics
from convpare.planning.cost import planned_cost
from convpare.planning.planner import POINT, Planner
from convpare.planning.settings import PlanOptions
from convpare.planning.solver import Budget
from convpare.prospect import prospect, trade_off
from convpare.redundancy import moments

X = torch.zeros(1, 3, 8, 8)
BOTH = PlanOptions(methods=("prune", "factorize"), images=64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5),
    ).eval()  # fmt: skip


def planner(options: PlanOptions = BOTH, criterion: str = "reconstruction") -> Planner:
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Planner(net(), X, images, criterion=criterion, options=options)


@pytest.mark.parametrize("options", [BOTH, PlanOptions(images=64), PlanOptions(methods=("factorize",), images=64)])
def test_savings_are_what_comes_back_without_the_edit(options: PlanOptions):
    making = planner(options)
    found = prospect(making, Budget(0.45, 0.6))
    made, graph = found.plan, making.graph
    names = [*(e.group for e in made.edits), *(e.layer for e in made.factorizations)]
    assert names and len(found.savings) == len(names)
    for number, edit in enumerate(made.edits):
        keep = made.keep(graph)
        keep[graph.group(edit.group).units] = True
        without = planned_cost(graph, keep, made.factorizations)
        assert without.macs - made.after.macs == found.savings[number].macs > 0
        assert without.params - made.after.params == found.savings[number].params > 0
    for number, chain in enumerate(made.factorizations, len(made.edits)):
        others = [e for e in made.factorizations if e is not chain]
        without = planned_cost(graph, made.keep(graph), others)
        assert without - made.after == found.savings[number]
    told = found.to_json()
    assert [row["of"] for row in told["savings"]] == names
    assert told["error"] == pytest.approx(sum(e.error or 0 for e in (*made.edits, *made.factorizations)))


def test_a_price_is_what_more_budget_takes_back():
    making = planner()
    made = making.plan(Budget(0.4, 0.9))
    looser = making.plan(Budget(0.4 + POINT, 0.9))
    prices = making.prices(made)
    assert prices["macs"] == pytest.approx(made.error - looser.error)
    assert prices["macs"] > 0
    assert prices["params"] == 0  # more parameters than the budget of MACs lets it use
    assert making.prices(making.plan(Budget(1.0))) == {"macs": 0.0}
    almost = making.prices(making.plan(Budget(1 - POINT / 4)))
    assert almost["macs"] == pytest.approx(making.plan(Budget(1 - POINT / 4)).error * 4)
    assert planner(PlanOptions(images=64, rounds=2)).prices(made) == {}


def test_a_curve_falls_with_the_budget_and_looks_at_the_network_once(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(statistics, name)

        def call(*args: Any, **named: Any) -> Any:
            calls.append(name)
            return original(*args, **named)

        return call

    monkeypatch.setattr(statistics, "metrics_of", counted("metrics_of"))
    making = planner()
    ranked = making.statistics.criterion.rank
    making.statistics.criterion = type(get_criterion("l2"))(
        "reconstruction", lambda context: calls.append("rank") or ranked(context), True, "global", ""
    )  # type: ignore[func-returns-value]
    curve = trade_off(making, Budget(0.3), 7)
    assert calls.count("rank") == calls.count("metrics_of") == 1
    assert [budget.macs for budget, _, _ in curve.steps] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert len(curve.plans) == 7
    errors = [plan.error for plan in curve.plans]
    assert errors == sorted(errors)
    assert all(plan.achieved["macs"] <= plan.requested["macs"] for plan in curve.plans)
    whole = planner().plan(Budget(0.3))
    assert curve.plans[-1] == whole  # the last is the plan itself, found on its own


def test_what_is_out_of_reach_is_said():
    curve = trade_off(planner(PlanOptions(methods=("prune",), images=64), "l2"), Budget(0.001), 4)
    assert [plan is None for _, plan, _ in curve.steps] == [False, False, False, True]
    assert "infeasible: macs 0.001 was asked for, at best" in curve.steps[-1][2]
    assert curve.to_json()["steps"][-1]["plan"] is None
    assert curve.to_json()["steps"][-1]["infeasible"] == curve.steps[-1][2]
    with pytest.raises(Infeasible):
        prospect(planner(), Budget(0.001))


def test_what_one_planner_makes_is_what_plan_makes():
    making = planner()
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for methods in (("prune",), ("factorize",), ("prune", "factorize")):
        options = PlanOptions(methods=methods, images=64)
        alone = convpare.plan(net(), X, images, macs=0.5, criterion="reconstruction", options=options)
        assert making.plan(Budget(0.5), methods=methods) == alone
    kept = making.plan(Budget(0.5), exclude=("0",))
    assert "0" not in {e.group for e in kept.edits} | {e.layer for e in kept.factorizations}
    with pytest.raises(ConvpareError, match="no group 'nowhere'"):
        making.plan(Budget(0.5), exclude=("nowhere",))
    head = making.plan(Budget(0.5), methods=("prune",), exclude=("9",))  # a layer, which is no group
    assert head.edits == making.plan(Budget(0.5), methods=("prune",)).edits
    with pytest.raises(ConvpareError, match="no group '9'"):
        planner(PlanOptions(images=64)).plan(Budget(0.5), exclude=("9",))


def test_edited_by_hand():
    """Another choice of channels is carried out, and the plan says what that costs."""
    made = convpare.plan(net(), X, macs=0.5, criterion="l2")
    content = made.to_json()
    edit = content["edits"][0]
    edit["keep"] = edit["keep"][:-1]
    changed = convpare.Plan.from_json(content)
    assert changed.after == made.after  # as the file still says
    small = convpare.apply(net(), changed)
    assert convpare.count(small, X).total.macs < made.after.macs
    carried = small._convpare_plan
    assert isinstance(carried, convpare.Plan)
    assert carried.after == convpare.count(small, X).total
    assert np.array_equal(carried.edits[0].keep, edit["keep"])


def test_plan_for_a_network_that_differs_elsewhere():
    """No edit names the layer that differs; the cost does."""
    made = convpare.plan(net(), X, macs=0.7, criterion="l2", options=PlanOptions(exclude=("5",)))
    other = net()
    other[-1] = nn.Linear(10, 7)
    macs, params = (f"{getattr(convpare.count(other, X).total, metric):,}" for metric in ("macs", "params"))
    expected = f"another network than this Sequential: it has {macs} MACs, the plan's .*; it has {params} parameters"
    with pytest.raises(ConvpareError, match=expected):
        convpare.apply(other, made)
    elsewhere = convpare.trace(net(), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConvpareError, match=r"it was traced on 1×3×16×16, the plan's on 1×3×8×8"):
        convpare.apply(net(), made, graph=elsewhere)


def test_ranking_and_chains_share_their_moments(monkeypatch: pytest.MonkeyPatch):
    """One pass over the images for both kinds of moments, whoever asks."""
    measured: list[int] = []
    original = moments.moments_of_both

    def measure(model: Any, layers: Any, *args: Any) -> Any:
        measured.append(len(layers))
        return original(model, layers, *args)

    monkeypatch.setattr(moments, "moments_of_both", measure)
    making = planner(criterion="sensitivity")
    making.plan(Budget(0.5))
    making.plan(Budget(0.4))
    assert measured == [4]
