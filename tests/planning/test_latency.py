"""Budgets of latency, on a machine whose times are known: what is predicted adds up, and the planner follows it."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import convpare
from convpare.compress import CompressOptions, carry_through, compress
from convpare.errors import ConvpareError, Infeasible
from convpare.factorize.edit import Factorize
from convpare.graph import trace
from convpare.measurement import measured
from convpare.planning import latency, statistics
from convpare.planning.cost import planned_cost
from convpare.planning.latency import NetworkTimes, timed_beside
from convpare.planning.layer_times import LayerTimes, Signature, Target
from convpare.planning.mixed import MixedModel
from convpare.planning.planner import Planner
from convpare.planning.settings import PlanOptions
from convpare.planning.solver import Budget
from convpare.terminal import show_compression

X = torch.zeros(1, 3, 8, 8)
IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
compress_module = sys.modules["convpare.compress"]  # its name is taken by the function
WHOLE = 100.0  # milliseconds of the network, as it is "measured"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.ConvTranspose2d(24, 16, 2, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip


def by_macs(signature: Signature, into: int, out: int) -> float:
    """A machine on which a layer takes as long as it has multiply-accumulates, and a little more."""
    positions = math.prod(signature.extent) * signature.batch
    each = 1 if signature.groups else into
    return 0.01 + 1e-5 * positions * math.prod(signature.kernel) * into * out / each


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Lets networks be planned on a machine that takes such times; the whole network takes `WHOLE`."""

    def install(measure: Any) -> None:
        monkeypatch.setattr(statistics, "cached", lambda target, device: LayerTimes(target, device, measure=measure))
        monkeypatch.setattr(latency, "timed_beside", lambda models, inputs, target: [WHOLE] * len(models))

    return install


def planner(machine: Callable[[Any], None], measure: Any = by_macs, **options: Any) -> Planner:
    machine(measure)
    settings = PlanOptions(images=64, scope="all", **options)
    return Planner(net(), X, IMAGES, criterion="reconstruction", options=settings)


def test_the_times_of_a_network_add_up(machine: Callable[[Any], None]):
    making = planner(machine)
    times, graph = making.statistics.times, making.graph
    keep = graph.keep_all()
    assert times.untimed == ()
    assert times.predicted(keep) == pytest.approx(WHOLE)
    layers = [times.of(x, None, *(len(graph.kept(a, keep)) for a in (x.into, x.out))) for x in graph.layers]
    assert times.scale == 1.0
    assert sum(layers) + times.rest == pytest.approx(WHOLE)
    assert layers[0] == pytest.approx(0.01 + 1e-5 * 64 * 9 * 3 * 16)
    assert layers[1] == pytest.approx(0.01 + 1e-5 * 64 * 9 * 16)
    assert layers[3] == pytest.approx(0.01 + 1e-5 * 64 * 4 * 24 * 16)
    assert layers[4] == pytest.approx(0.01 + 1e-5 * 16 * 5)


def test_layers_that_are_slower_alone_than_together(machine: Callable[[Any], None]):
    making = planner(machine, lambda signature, into, out: 50.0)
    assert making.statistics.times.scale == pytest.approx(WHOLE / 250)
    assert making.statistics.times.rest == pytest.approx(0)
    assert making.statistics.times.predicted(making.graph.keep_all()) == pytest.approx(WHOLE)


def test_chains_take_the_time_of_their_layers(machine: Callable[[Any], None]):
    making = planner(machine)
    times, layer = making.statistics.times, making.graph.layer("4")
    assert times.of(layer, ("oh|iw", (5,)), 16, 24) == pytest.approx(0.02 + 1e-5 * 64 * 3 * 5 * (16 + 24))
    assert times.of(layer, ("oi|hw", (2,)), 16, 24) == pytest.approx(0.02 + 1e-5 * 64 * (9 * 32 + 32 * 24))
    assert times.of(layer, ("o|ihw", (7,)), 10, 12) == pytest.approx(0.02 + 1e-5 * 64 * 7 * (9 * 10 + 12))
    up = making.graph.layer("7")
    assert times.of(up, ("o|ihw", (3,)), 24, 16) == pytest.approx(0.02 + 1e-5 * 64 * 3 * (24 * 4) + 1e-5 * 256 * 3 * 16)


@pytest.mark.parametrize("step", [1, 8])
def test_the_solvers_cost_is_the_prediction(machine: Callable[[Any], None], step: int):
    """For random channels and chains, with savings as differences."""

    def measure(signature: Signature, into: int, out: int) -> float:
        return by_macs(signature, *(-(-x // step) * step for x in (into, out)))

    making = planner(machine, measure)
    graph, times = making.graph, making.statistics.times
    choices = list(making.statistics.chains(True).values())
    model = MixedModel(graph, choices, times)
    rng = np.random.default_rng(0)
    for _ in range(8):
        counts = np.array([rng.integers(1, g.channels + 1) for g in graph.groups], float)
        keep = graph.keep_all()
        for group, count in zip(graph.groups, counts, strict=True):
            keep[group.start + int(count) : group.start + group.channels] = False
        assert model.cost(counts)["latency"] == pytest.approx(times.predicted(keep))
        at = [int(rng.integers(0, 1 + len(c.chains))) for c in choices]
        chains = [
            Factorize(c.layer.name, c.chains[i - 1].form, (c.chains[i - 1].rank,), ())
            for c, i in zip(choices, at, strict=True)
            if i
        ]
        cost = model.with_chains(counts, at)
        assert cost["latency"] == pytest.approx(times.predicted(keep, tuple(chains)))
        assert cost["macs"] == planned_cost(graph, keep, chains).macs
        for group in range(len(graph.groups)):
            fewer = int(rng.integers(0, counts[group]))
            other = counts.copy()
            other[group] -= fewer
            difference = model.cost(counts)["latency"] - model.cost(other)["latency"]
            assert model.saving(counts, group, fewer)["latency"] == pytest.approx(difference, abs=1e-9)
            spent = model._spent(np.stack([model._sizes(counts), model._sizes(other)]), group)
            assert spent[0, 2] - spent[1, 2] == pytest.approx(difference, abs=1e-9)


@pytest.mark.parametrize("methods", [("prune",), ("factorize",), ("prune", "factorize")])
def test_a_budget_of_latency(machine: Callable[[Any], None], methods: tuple[str, ...]):
    making = planner(machine, lambda *given: 1000 * by_macs(*given), methods=methods)
    made = making.plan(Budget(latency=0.5))
    before, after = made.options["latency_ms"]
    assert before == WHOLE
    assert after <= 0.5 * WHOLE
    assert after == pytest.approx(making.statistics.times.predicted(made.keep(making.graph), made.factorizations))
    assert made.requested == {"latency": 0.5}
    assert convpare.Plan.from_json(made.to_json()) == made
    both = making.plan(Budget(macs=0.4, latency=0.5))
    assert both.achieved["macs"] <= 0.4
    assert both.options["latency_ms"][1] <= 0.5 * WHOLE
    assert making.prices(made)["latency"] > 0


def test_what_is_fast_is_chosen(machine: Callable[[Any], None]):
    """On a machine where depthwise convolutions cost much and 1x1 nothing, no chain has atoms; where rows cost, none
    has rows.
    """

    def slow_depthwise(signature: Signature, into: int, out: int) -> float:
        return 1e6 if not signature.groups and "4" in chosen else 1000 * by_macs(signature, into, out)

    chosen: list[str] = ["4"]
    forms = {e.form for e in _chains(machine, slow_depthwise)}
    assert forms and not forms & {"oi|hw", "o|hiw"}

    def slow_rows(signature: Signature, into: int, out: int) -> float:
        flat = len(set(signature.kernel)) == 2
        return 1e6 if flat else 1000 * by_macs(signature, into, out)

    forms = {e.form for e in _chains(machine, slow_rows)}
    assert forms and not forms & {"oh|iw", "ow|ih", "oiw|h", "oih|w", "w|oih", "h|oiw"}


def _chains(machine: Callable[[Any], None], measure: Any) -> tuple[Factorize, ...]:
    machine(measure)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3)).eval()
    options = PlanOptions(methods=("factorize",), images=64)
    making = Planner(model, X, IMAGES, criterion="reconstruction", options=options)
    return making.plan(Budget(latency=0.6)).factorizations


def test_no_chain_is_slower_than_its_layer(machine: Callable[[Any], None]):
    """Each link takes more than the whole layer: no chain is worth it, and the budget is out of reach."""
    with pytest.raises(Infeasible, match=r"latency 0\.6 was asked for, at best 1 can be reached"):
        planner(machine, lambda *_: 20.0, methods=("factorize",)).plan(Budget(latency=0.6))


def test_steps_of_the_machine_are_followed(machine: Callable[[Any], None]):
    """Where times go up in steps of 8, what is kept goes in steps of 8: fewer would save nothing and cost error."""
    machine(lambda s, i, o: 1000 * by_macs(s, -(-i // 8) * 8, -(-o // 8) * 8))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval()
    options = PlanOptions(images=64, scope="all")
    made = Planner(model, X, IMAGES, criterion="reconstruction", options=options).plan(Budget(latency=0.5))
    assert made.edits
    assert all(len(edit.keep) % 8 == 0 for edit in made.edits)


def test_compress_meets_what_is_measured(machine: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch):
    """The network is slower than predicted: the plan is made anew with less, until the clock says so."""
    machine(lambda *given: 1000 * by_macs(*given))
    shares = []

    def clock(models: list[nn.Module], graph: Any, target: Target) -> list[float]:
        assert target == Target("eager", 4, 1)
        share = convpare.count(models[1], X).total.macs / convpare.count(models[0], X).total.macs
        shares.append(min(1.0, 1.3 * share))
        return [WHOLE, WHOLE * shares[-1]]

    monkeypatch.setattr(compress_module, "timed_beside", clock)
    options = CompressOptions(PlanOptions(images=64, scope="all", latency=0.6, target=Target("eager", 4, 1)), None)
    done = compress(net(), X, IMAGES, criterion="reconstruction", options=options)
    assert len(shares) > 1
    assert shares[-1] <= 0.6 < shares[0]
    assert done.plan.requested == {"latency": 0.6}
    assert done.to_json()["latency"] == {"runtime": "eager", "batch": 4, "threads": 1, "ms": list(done.latency)}
    assert done.latency == (WHOLE, WHOLE * shares[-1])
    monkeypatch.setattr(compress_module, "timed_beside", lambda *_: [WHOLE, 0.9 * WHOLE])
    with pytest.raises(Infeasible, match=r"latency 0\.6 was asked for; 5 plans .* the last takes 0\.900"):
        compress(net(), X, IMAGES, criterion="reconstruction", options=options)


def test_a_plan_that_is_applied_is_timed_where_it_is_to_run(
    machine: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    target = Target("eager", 4, 1)
    making = planner(machine, lambda *given: 1000 * by_macs(*given), latency=0.6, target=target)
    plan = making.plan(Budget())
    asked = []

    def clock(models: list[nn.Module], inputs: Any, target: Target) -> list[float]:
        asked.append((len(models), inputs, target))
        return [WHOLE, 0.7 * WHOLE]

    monkeypatch.setattr(compress_module, "timed_beside", clock)
    bare = CompressOptions(recover=None)
    done = carry_through(net(), plan, options=bare)
    assert asked == [(2, (tuple(X.shape),), target)]
    assert done.latency == (WHOLE, 0.7 * WHOLE)
    assert done.to_json()["latency"] == {"runtime": "eager", "batch": 4, "threads": 1, "ms": [WHOLE, 0.7 * WHOLE]}
    show_compression(done, measured(net(), done, X), Path("out"), None)
    told = capsys.readouterr()
    assert "latency under the budget of × 0.6" in told.out
    assert "slower than the budget asks for" in told.err
    for bad in (None, [], {"runtime": "eager"}, {"runtime": "eager", "batch": True, "threads": None}):
        edited = replace(plan, options={**plan.options, "target": bad})
        with pytest.raises(ConvpareError, match="a budget of latency, but its target is"):
            carry_through(net(), edited, options=bare)
    without = replace(plan, requested={"macs": 0.9})
    assert carry_through(net(), without, options=bare).latency == ()


def test_real_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On this machine: all layers have times, the store fills, and a second network needs few more."""
    monkeypatch.setenv("CONVPARE_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    options = PlanOptions(methods=("prune", "factorize"), images=64, scope="all", target=Target(threads=1))
    making = Planner(net(), X, IMAGES, criterion="reconstruction", options=options)
    made = making.plan(Budget(macs=0.9, latency=1.0))
    assert made.options["latency_ms"][0] > 0
    assert len(list(tmp_path.iterdir())) == 1
    assert making.statistics.times.untimed == ()
    graph = trace(net(), X)
    assert all(x > 0 for x in timed_beside([net(), net()], graph.inputs, Target(batch=3, threads=1), 0.0))


def test_layers_that_are_no_plain_modules_are_in_the_rest(machine: Callable[[Any], None]):
    class Own(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    machine(by_macs)
    model = nn.Sequential(Own(3, 8, 3), nn.Conv2d(8, 4, 3)).eval()
    graph = trace(model, X)
    times = NetworkTimes(model, graph, LayerTimes(Target(), torch.device("cpu"), measure=by_macs))
    assert times.untimed == ("0",)
    half = graph.keep_all()
    half[:4] = False
    assert times.rest < times.whole
    assert times.predicted(half) < times.predicted(graph.keep_all()) == pytest.approx(WHOLE)


def test_budgets_without_sense():
    for given in ({"latency": 0.0}, {"latency": 1.5}, {"latency": float("nan")}):
        with pytest.raises(ConvpareError, match="the latency budget is"):
            convpare.plan(net(), X, criterion="l2", options=PlanOptions(**given))  # type: ignore[arg-type]
    assert next(Budget(0.5, latency=0.5).approached(2)) == replace(Budget(0.75), latency=0.75)
