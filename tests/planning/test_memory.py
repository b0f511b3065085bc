"""Peak memory: what is alive at a time, as a runtime that frees tensors after their last use; budgets of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import convpare
from convpare.blocks import resnet20
from convpare.errors import ConvpareError, Infeasible
from convpare.graph import removed, trace
from convpare.graph.structure import Form
from convpare.planning.memory import MemoryModel, caps, peak_memory
from convpare.planning.plan import Plan
from convpare.planning.settings import PlanOptions
from convpare.planning.solver import Allocation, CostModel


class Branches(nn.Module):
    """A stream that is added to, a concatenation, a depthwise layer, a view and tensors written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 12, 3, padding=1),
            nn.Conv2d(12, 20, 3, padding=1),
            nn.Conv2d(20, 12, 1),
        )
        self.wide, self.depthwise = nn.Conv2d(12, 30, 1), nn.Conv2d(30, 30, 3, padding=1, groups=30)
        self.head = nn.Linear(42, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.stem(x))
        x = x + self.b(F.relu(self.a(x)))
        y = self.depthwise(F.relu_(self.wide(x)))
        return self.head(torch.cat([x, y], 1).flatten(2).mean(2))


class Heads(nn.Module):
    """Attention over positions, whose weights are as many as heads and positions squared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(x.shape).mean(1))


def line() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Conv1d(8, 12, 5, stride=2), nn.ReLU(), nn.Conv1d(12, 3, 1))


NETS = {
    "branches": (Branches, (2, 3, 16, 16)), "heads": (Heads, (2, 3, 16, 16)), "line": (line, (3, 2, 40)),
    "resnet20": (resnet20, (1, 3, 32, 32)),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = NETS[name]
    return build().eval(), torch.randn(shape)


class Watched(fx.Interpreter):
    """Runs a captured graph, frees values after their last use, and sums the storages that are there."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        module = torch.export.export(model, (inputs,)).module(check_guards=False)
        self.permanent = {x.untyped_storage().data_ptr() for x in [*module.parameters(), *module.buffers()]}
        self.peak = 0
        super().__init__(module)
        with torch.no_grad():
            self.run(inputs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        alive = [x for x in [*self.env.values(), result] if isinstance(x, Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
        self.peak = max(self.peak, sum(size for at, size in storages.items() if at not in self.permanent))
        return result


@pytest.mark.parametrize("name", NETS)
def test_as_a_run_that_frees_what_nobody_reads_any_more(name: str):
    model, inputs = made(name)
    graph = trace(model, inputs)
    assert graph.memory is not None
    assert graph.memory.peak(graph.keep_all()) == Watched(model, inputs).peak > inputs.nbytes


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", NETS)
def test_foretold_of_any_removal(name: str, form: Form):
    """Under random masks: what a new capture of the smaller network says, operator by operator."""
    model, inputs = made(name)
    graph = trace(model, inputs, form=form)
    counts = MemoryModel(graph.memory, graph.groups)
    rng = np.random.default_rng(0)
    for _ in range(3):
        keep = graph.keep_all()
        for group in graph.groups:
            keep[group.start + rng.permutation(group.channels)[: rng.integers(0, group.channels)]] = False
        small = trace(removed(model, graph, keep), inputs)
        expected = small.memory.alive(small.keep_all())
        if form == "module":  # the graph form leaves operators out that check types
            assert graph.memory.alive(keep).tolist() == expected.tolist()
        assert graph.memory.peak(keep) == small.memory.peak(small.keep_all()) == peak_memory(graph, keep)
        kept = np.array([keep[g.units].sum() for g in graph.groups], float)
        assert counts.peak(kept) == pytest.approx(expected.max(), rel=1e-12)
        peak, slope = counts.at_the_peak(kept)
        for step, bytes_more in zip(1e-6 * np.eye(len(kept)), slope, strict=True):
            assert (counts.peak(kept + step) - peak) / 1e-6 == pytest.approx(bytes_more, rel=1e-3, abs=1e-2)


def test_nobody_can_have_more():
    """Groups take what the budget leaves: one level more of any, and it is exceeded; the dearest keep most."""
    model, inputs = made("branches")
    graph = trace(model, inputs)
    counts = MemoryModel(graph.memory, graph.groups)
    levels = [np.arange(g.channels, 0, -1) for g in graph.groups]
    rng = np.random.default_rng(0)
    errors = [np.concatenate([[0.0], np.cumsum(np.sort(rng.exponential(1.0, len(x) - 1)))]) for x in levels]
    whole = counts.peak(np.array([x[0] for x in levels], float))
    for share in (0.95, 0.8, 0.6, 0.45):
        at = caps(counts, Allocation(CostModel(graph), levels, errors, {}), share * whole)
        kept = np.array([x[i] for x, i in zip(levels, at, strict=True)], float)
        assert counts.peak(kept) <= share * whole
        for g in np.flatnonzero(at):
            more = kept.copy()
            more[g] = levels[g][at[g] - 1]
            assert counts.peak(more) > share * whole


@pytest.mark.parametrize("methods", [("prune",), ("prune", "factorize")])
@pytest.mark.parametrize("macs", [None, 0.4])
def test_a_budget_of_memory(methods: tuple[str, ...], macs: float | None):
    model, inputs = made("branches")
    images = torch.randn(64, *inputs.shape[1:], generator=torch.Generator().manual_seed(1))
    options = PlanOptions(methods=methods, memory=0.7, images=64, scope="all")
    plan = convpare.plan(model, inputs, images, macs=macs, criterion="reconstruction", options=options)
    before, after = plan.memory
    assert before == Watched(model, inputs).peak
    assert after <= 0.7 * before
    assert plan.achieved["memory"] == after / before
    small = convpare.apply(model, plan, images)
    assert Watched(small, inputs).peak == after
    assert bool(plan.factorizations) == (macs is not None and "factorize" in methods)
    if macs is not None:
        assert plan.achieved["macs"] <= macs
    assert Plan.from_json(plan.to_json()) == plan
    assert f"{after:,}" in str(plan)


def test_chains_have_tensors_of_their_own():
    """Of a network whose layers all become chains: what is foretold is what a new capture says."""
    model, inputs = made("branches")
    images = torch.randn(64, *inputs.shape[1:], generator=torch.Generator().manual_seed(1))
    options = PlanOptions(methods=("factorize",), images=64)
    plan = convpare.plan(model, inputs, images, macs=0.35, criterion="reconstruction", options=options)
    graph = trace(model, inputs)
    small = trace(convpare.apply(model, plan, images), inputs)
    assert len(plan.factorizations) > 2
    foretold = peak_memory(graph, plan.keep(graph), plan.factorizations)
    assert foretold == peak_memory(small, small.keep_all())


def test_edited_by_hand():
    model, inputs = made("branches")
    graph = trace(model, inputs)
    plan = convpare.plan(model, inputs, criterion="l2", options=PlanOptions(memory=0.7, scope="all"))
    fewer = replace(plan, edits=plan.edits[:-1]).made_true(graph)
    assert fewer.memory == (plan.memory[0], peak_memory(graph, fewer.keep(graph)))
    content = plan.to_json() | {"options": {**plan.options, "memory_bytes": ["much", 3]}}
    with pytest.raises(ConvpareError, match="memory_bytes"):
        Plan.from_json(content)
    with pytest.raises(ConvpareError, match="budget of memory"):
        Plan.from_json(plan.to_json() | {"requested": {}})


def test_out_of_reach():
    model, inputs = made("branches")
    graph = trace(model, inputs)
    with pytest.raises(Infeasible, match=r"memory 0\.001 was asked for, at best 0\.\d+ can be reached"):
        convpare.plan(model, inputs, criterion="l2", options=PlanOptions(memory=0.001))
    in_parts = replace(graph, memory=None)
    with pytest.raises(ConvpareError, match="captured in parts"):
        convpare.plan(model, inputs, criterion="l2", options=PlanOptions(memory=0.5), graph=in_parts)
    with pytest.raises(ConvpareError, match=r"memory budget is 1\.5"):
        convpare.plan(model, inputs, criterion="l2", options=PlanOptions(memory=1.5))
