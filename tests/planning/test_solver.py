"""The solver's costs are the counter's; its allocations hold the budgets, leave no rest, and are nearly the best."""

import itertools
import math
import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convpare.blocks import mobilenet_v1_025, resnet20
from convpare.errors import ConvpareError
from convpare.graph import Graph, trace
from convpare.planning.cost import out_channels, total_cost
from convpare.planning.plan import Plan
from convpare.planning.planner import plan
from convpare.planning.settings import PlanOptions
from convpare.planning.solver import (
    Allocation,
    Budget,
    CostModel,
    allocate,
    allowed_levels,
    check_feasible,
    even_errors,
    limits_of,
)

METRICS = ("macs", "params")
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


class Grouped(nn.Module):
    """Grouped, transposed and grouped transposed convolutions; 7x7 maps flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 24, 3, stride=2, groups=4, padding=1, bias=False)
        self.up, self.c = nn.ConvTranspose2d(24, 16, 2, stride=2, groups=2), nn.Conv2d(16, 10, 2)
        self.head = nn.Linear(10 * 49, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.c(self.up(F.relu(self.b(F.relu(self.a(x)))))))
        return self.head(y.flatten(1))


class Concatenated(nn.Module):
    """Dense connections: a layer reads several groups. The wide sum comes first, and bears each channel twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.a = nn.Conv2d(3, 32, 1), nn.Conv2d(3, 16, 3, padding=1)
        self.b, self.last = nn.Conv2d(16, 9, 3, padding=1), nn.Conv2d(32 + 16 + 9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.wide(x)
        a = F.relu(self.a(x))
        wide = wide + torch.cat([a, a], 1)
        return self.last(torch.cat([wide, F.relu(self.b(a)), a], 1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (resnet20, (1, 3, 32, 32)),
    "mobilenet": (mobilenet_v1_025, (2, 3, 32, 32)),
    "grouped": (Grouped, (1, 3, 8, 8)),
    "concatenated": (Concatenated, (3, 3, 5, 5)),
    "flattened": (lambda: nn.Sequential(nn.Conv2d(3, 49, 3), nn.Flatten(), nn.Linear(49 * 49, 7)), (1, 3, 9, 9)),
}  # fmt: skip


@cache
def traced(name: str) -> tuple[nn.Module, Tensor, Graph]:
    build, shape = NETS[name]
    torch.manual_seed(0)
    model = build()
    return model, torch.zeros(shape), trace(model, torch.zeros(shape))


def full(graph: Graph) -> np.ndarray:
    return np.array([g.channels for g in graph.groups], float)


def random_counts(graph: Graph, rng: np.random.Generator) -> np.ndarray:
    return np.array([rng.integers(1, g.channels + 1) for g in graph.groups], float)


def mask(graph: Graph, kept: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    keep = graph.keep_all()
    for group, count in zip(graph.groups, kept, strict=True):
        keep[group.start + rng.permutation(group.channels)[int(count) :]] = False
    return keep


def planned(name: str, **given: object) -> Plan:
    """A plan by L2 with the budgets and options that are given."""
    model, x, graph = traced(name)
    budgets = {m: given.pop(m) for m in METRICS if m in given}
    return plan(model, x, criterion="l2", options=PlanOptions(**given), graph=graph, **budgets)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETS)
@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_cost_is_the_counters_exactly(name: str, seed: int):
    _, _, graph = traced(name)
    rng = np.random.default_rng(seed)
    model = CostModel(graph)
    kept = random_counts(graph, rng)
    counted = total_cost(graph, mask(graph, kept, rng))
    assert model.cost(kept) == {"macs": counted.macs, "params": counted.params}
    group = int(rng.integers(len(graph.groups)))
    fewer = int(rng.integers(-2, int(kept[group]) + 1))
    after = kept.copy()
    after[group] -= fewer
    saved = {m: model.cost(kept)[m] - model.cost(after)[m] for m in METRICS}
    assert model.saving(kept, group, fewer) == saved


@pytest.mark.parametrize("name", NETS)
@settings(quick, max_examples=15)
@given(
    macs=st.none() | st.floats(0.02, 1),
    params=st.none() | st.floats(0.02, 1),
    round_to=st.sampled_from([1, 4, 8]),
    scope=st.sampled_from(["auto", "inner", "all"]),
    how=st.sampled_from(["uniform", "global"]),
)
def test_budgets_hold(name: str, macs: float | None, params: float | None, round_to: int, scope: str, how: str):
    wanted = {m: v for m, v in (("macs", macs), ("params", params)) if v is not None}
    if not wanted:
        return
    _, _, graph = traced(name)
    try:
        made = planned(name, **wanted, round_to=round_to, scope=scope, allocation=how)
    except ConvpareError as error:
        assert "infeasible" in str(error)
        return
    keep = made.keep(graph)
    assert made.after == total_cost(graph, keep)
    for metric, fraction in wanted.items():
        assert made.achieved[metric] <= fraction
    for group in graph.groups:
        assert keep[group.units].any()
        assert scope != "inner" or graph.is_inner(group) or keep[group.units].all()
    dense = graph.keep_all()
    for layer in graph.layers:
        channels = out_channels(graph, layer, keep)
        assert channels % round_to == 0 or channels == out_channels(graph, layer, dense), layer.name


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", NETS)
def test_a_budget_that_is_met_exactly_is_met(name: str, metric: str):
    """Shares of whole numbers, which floating point rounds up or down: what was achieved can be asked for."""
    _, _, graph = traced(name)
    rng = np.random.default_rng(1)
    model, dense = CostModel(graph), CostModel(graph).cost(full(graph))
    for _ in range(100):
        cost = model.cost(random_counts(graph, rng))[metric]
        limit = limits_of(model, graph, Budget(**{metric: cost / dense[metric]}))[metric]
        assert limit == cost
        below = float(np.nextafter(cost / dense[metric], 0))
        assert limits_of(model, graph, Budget(**{metric: below}))[metric] / dense[metric] <= below


def instance(graph: Graph, budget: Budget, rng: np.random.Generator, convex: bool = True) -> Allocation:
    def errors(channels: int) -> np.ndarray:
        each = rng.random(channels - 1) ** 2
        return np.concatenate([[0.0], np.cumsum(np.sort(each) if convex else each)])

    model = CostModel(graph)
    levels = allowed_levels(graph, 1)
    return Allocation(model, levels, [errors(g.channels) for g in graph.groups], limits_of(model, graph, budget))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("macs", "params"), [(0.6, None), (None, 0.45), (0.7, 0.6)])
def test_nothing_more_fits(name: str, macs: float | None, params: float | None):
    _, _, graph = traced(name)
    rng = np.random.default_rng(5)
    for convex in (True, False):
        allocation = instance(graph, Budget(macs, params), rng, convex)
        allocate(allocation)
        assert allocation.fits()
        for g, at in enumerate(allocation.at):
            if at:
                more = allocation.kept.copy()
                more[g] = allocation.levels[g][at - 1]
                cost = allocation.model.cost(more)
                assert any(cost[m] > limit for m, limit in allocation.limits.items())


def optimum(allocation: Allocation) -> float:
    best = math.inf
    for at in itertools.product(*(range(len(levels)) for levels in allocation.levels)):
        error = sum(errors[i] for errors, i in zip(allocation.errors, at, strict=True))
        if error < best:
            kept = np.array([levels[i] for levels, i in zip(allocation.levels, at, strict=True)], float)
            cost = allocation.model.cost(kept)
            if all(cost[m] <= limit for m, limit in allocation.limits.items()):
                best = error
    return best


@pytest.mark.parametrize("block", range(4))
def test_nearly_as_good_as_trying_everything(block: int):
    """120 tiny networks with random errors and budgets: never infeasible, nearly always the optimum."""
    ratios = []
    for seed in range(15 * block, 15 * block + 15):
        rng = np.random.default_rng(seed)
        a, b, c = rng.integers(2, 7, 3).tolist()
        net = nn.Sequential(
            nn.Conv2d(3, a, 3, padding=1), nn.Conv2d(a, b, 3, 2, padding=1), nn.Conv2d(b, c, 1), nn.Conv2d(c, 4, 1)
        )  # fmt: skip
        graph = trace(net, torch.zeros(1, 3, 6, 6))
        least = CostModel(graph).cost(np.ones(3))
        for two in (False, True):
            shares = {m: least[m] / CostModel(graph).cost(full(graph))[m] for m in METRICS}
            budget = Budget(rng.uniform(shares["macs"], 1), rng.uniform(shares["params"], 1) if two else None)
            allocation = instance(graph, budget, rng, convex=bool(seed % 2))
            allocate(allocation)
            assert allocation.fits()
            ratios.append(allocation.error / max(optimum(allocation), 1e-9))
    assert np.mean(np.array(ratios) < 1 + 1e-6) >= 0.95
    assert np.mean(np.array(ratios) <= 1.1) >= 0.95
    assert max(ratios) <= 1.25


def test_even_errors_take_the_same_share_of_every_group():
    made = planned("resnet20", macs=0.5, scope="inner", allocation="uniform")
    shares = [edit.removed / edit.channels for edit in made.edits]
    assert len(shares) == 9
    assert max(shares) - min(shares) < 0.13  # a channel of the narrow groups is a sixteenth
    _, _, graph = traced("resnet20")
    model = CostModel(graph)
    for errors, levels in zip(
        even_errors(model, allowed_levels(graph, 1), ["macs"]), allowed_levels(graph, 1), strict=True
    ):
        assert errors[0] == 0
        assert np.allclose(errors / errors[-1], ((levels[0] - levels) / (levels[0] - levels[-1])) ** 2)


def test_levels_by_hand():
    _, _, graph = traced("concatenated")
    assert {g.name: g.channels for g in graph.groups} == {"wide": 16, "b": 9}
    assert graph.group("wide").producers == ("wide", "a")  # a channel stands twice in the first, once in the second
    assert [levels.tolist() for levels in allowed_levels(graph, 4)] == [[16, 12, 8, 4], [9, 8, 4]]
    assert [levels.tolist() for levels in allowed_levels(graph, 16)] == [[16], [9]]
    _, _, graph = traced("grouped")
    by_name = dict(zip([g.name for g in graph.groups], allowed_levels(graph, 8), strict=True))
    assert graph.group("a").channels == 3  # each for one channel in each of four groups
    assert by_name["a"].tolist() == [3, 2]
    assert graph.group("up").channels == 8
    assert by_name["up"].tolist() == [8, 4]


@pytest.mark.parametrize("scope", ["inner", "all"])
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["resnet20", "grouped", "flattened"])
def test_what_is_out_of_reach_says_what_is_in_reach(name: str, metric: str, round_to: int, scope: str):
    options = {"round_to": round_to, "scope": scope}
    with pytest.raises(ConvpareError, match=f"infeasible: {metric} 0.0001 was asked for, at best 0") as caught:
        planned(name, **{metric: 1e-4}, **options)
    best = float(re.search(r"at best (\S+)", str(caught.value))[1])  # type: ignore[index]
    assert planned(name, **{metric: best}, **options).achieved[metric] > best - 1e-4
    with pytest.raises(ConvpareError, match="infeasible"):
        planned(name, **{metric: best - 1e-4}, **options)


def test_groups_whose_channels_count_each_other_keep_two():
    """One channel alone has no variance: a layer norm would make nothing of it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    graph = trace(model, torch.zeros(1, 4))
    assert {group.name: group.least for group in graph.groups} == {"0": 2, "2": 1}
    assert [levels.tolist() for levels in allowed_levels(graph, 1)] == [[6, 5, 4, 3, 2], [5, 4, 3, 2, 1]]
    assert [levels.tolist() for levels in allowed_levels(graph, 4)] == [[6, 4], [5, 4]]


def test_feasible_is_silent():
    _, _, graph = traced("grouped")
    budget, model = Budget(0.5), CostModel(graph)
    fewest = np.array([levels[-1] for levels in allowed_levels(graph, 1)], float)
    check_feasible(model, fewest, limits_of(model, graph, budget), budget)


def test_auto_takes_the_streams_only_where_inner_channels_do_not_suffice():
    assert planned("resnet20", macs=0.5).options["scope"] == "inner"
    assert planned("resnet20", macs=0.03).options["scope"] == "all"
    assert planned("resnet20", macs=0.28).options["scope"] == "inner"
    assert "infeasible" in failure("resnet20", macs=0.28, scope="inner", round_to=8)
    assert planned("resnet20", macs=0.28, round_to=8).options["scope"] == "all"


def failure(name: str, **given: object) -> str:
    with pytest.raises(ConvpareError) as caught:
        planned(name, **given)
    return str(caught.value)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("fraction", [0, 1.5, -1, math.nan, math.inf])
def test_budgets_out_of_range(metric: str, fraction: float):
    assert f"the {metric} budget is {fraction}" in failure("grouped", **{metric: fraction})


def test_a_budget_of_one_removes_nothing():
    for budgets in ({"macs": 1.0}, {"params": 1.0}, {"macs": 1.0, "params": 1.0}):
        made = planned("grouped", **budgets)
        assert made.edits == ()
        assert made.before == made.after


def test_what_cannot_be_counted_has_no_budget():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(6, 3, 1, 1)), nn.Parameter(torch.randn(2, 6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(x, self.a), self.b)

    graph = trace(Computed(), torch.zeros(1, 3, 4, 4))
    model = CostModel(graph)
    assert model.cost(full(graph))["macs"] > 0  # parameters without a module are counted
    model._positions[:] = 0
    with pytest.raises(ConvpareError, match="none of the macs of Computed can be counted"):
        limits_of(model, graph, Budget(macs=0.5))
