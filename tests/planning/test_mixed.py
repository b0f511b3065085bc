"""Plans that mix channels and chains: what they cost, that they are good, and that they can be carried out."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convpare
from convpare.compress import CompressOptions, compress
from convpare.errors import ConvpareError, Infeasible
from convpare.factorize.edit import Factorize
from convpare.graph import Graph, trace
from convpare.planning.cost import count, planned_cost
from convpare.planning.mixed import Choices, MixedModel, keep_of
from convpare.planning.options import chains_of, dense_cost, factorizable, metrics_of, restricted, value
from convpare.planning.plan import Plan
from convpare.planning.planner import calibration_images
from convpare.planning.settings import PlanOptions
from convpare.redundancy.moments import Moments, Sampling

IMAGES = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A residual stream with two blocks, a strided and a depthwise convolution, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(12, 10, 1), nn.Conv2d(10, 12, (3, 1), padding=(1, 0))
        self.deep = nn.Conv2d(12, 12, 3, groups=12)
        self.down = nn.Conv2d(12, 20, 3, stride=2)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        y = y + self.a2(torch.relu(self.a1(y)))
        y = y + self.b2(torch.relu(self.b1(y)))
        return self.head(torch.relu(self.down(self.deep(y))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():  # nearly repeated inside of kernels in some layers, across channels in others
        for layer, rank in ((model.a2, 4), (model.down, 6)):
            u, s, v = torch.linalg.svd(layer.weight.flatten(1), full_matrices=False)
            s[rank:] *= 0.1
            layer.weight.copy_(((u * s) @ v).reshape(layer.weight.shape))
        model.a1.weight[8:] = model.a1.weight[:8] + 0.05 * torch.randn(8, 12, 3, 3)
        model.a1.bias[8:] = model.a1.bias[:8]
    return model


def mixed(*methods: str, **others: Any) -> PlanOptions:
    return PlanOptions(methods=methods, images=96, scope="all", **others)


def offered(model: nn.Module, graph: Graph, keep: np.ndarray, relative: bool = True) -> list[Choices]:
    layers = factorizable(model, graph)
    known = metrics_of(Moments(model, calibration_images(IMAGES, len(IMAGES), 0)), layers, not relative)
    weights = dict(model.named_parameters())
    return [Choices(x, tuple(chains_of(graph, x, weights[x.weight], known[x.name], keep, relative))) for x in layers]


def test_the_cost_of_any_choice():
    """Of random counts and chains: what `planned_cost` says, and the prices' search sees the same differences."""
    model = net()
    graph = trace(model, IMAGES[:2])
    choices = offered(model, graph, graph.keep_all())
    cost = MixedModel(graph, choices)
    rng = np.random.default_rng(0)
    orders = {g.name: rng.permutation(g.channels) for g in graph.groups}
    for _ in range(12):
        counts = np.array([rng.integers(max(1, g.channels // 2), g.channels + 1) for g in graph.groups], float)
        keep = keep_of(graph, orders, counts)
        at = [int(rng.integers(0, 1 + len(c.chains))) for c in choices]
        edits = [
            Factorize(c.layer.name, c.chains[i - 1].form, (c.chains[i - 1].rank,), ())
            for c, i in zip(choices, at, strict=True)
            if i
        ]
        expected = planned_cost(graph, keep, edits)
        assert cost.with_chains(counts, at) == {"macs": expected.macs, "params": expected.params}
        for group in range(len(graph.groups)):
            levels = np.arange(graph.groups[group].channels, 0, -1)
            others = np.stack([np.where(np.arange(len(counts)) == group, level, counts) for level in levels])
            spent = cost._spent(np.stack([cost._sizes(other) for other in others]), group)
            whole = [list(cost.cost(other).values()) for other in others]
            assert spent - spent[0] == pytest.approx(np.array(whole) - whole[0], abs=1e-6)


def test_counts_and_chains_together_against_all_there_are():
    """The search by prices on small networks, beside the best of all counts with all chains."""
    found, best = [], []
    for seed, macs in itertools.product(range(4), (0.3, 0.5, 0.7)):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
        graph = trace(model, IMAGES[:1])
        choices = offered(model, graph, graph.keep_all())
        cost, rng = MixedModel(graph, choices), np.random.default_rng(seed)
        levels = [np.arange(g.channels, 0, -1) for g in graph.groups]
        curves = [
            np.concatenate([[0.0], np.cumsum(np.sort(rng.exponential(0.1, len(allowed) - 1)))]) for allowed in levels
        ]
        limits = {"macs": macs * cost.cost(cost.whole)["macs"]}

        def error(counts: np.ndarray, cost: MixedModel = cost, curves: list[np.ndarray] = curves,
                  limits: dict[str, float] = limits) -> float:  # fmt: skip
            try:
                chains, _ = cost.best_chains(counts, limits)
            except Infeasible:
                return np.inf
            gone = (cost.whole - counts).astype(int)
            return sum(c.error for c in chains if c) + sum(float(x[g]) for x, g in zip(curves, gone, strict=True))

        priced = cost.priced(levels, curves, limits)
        assert priced is not None
        counts, _ = priced
        found.append(error(counts))
        best.append(min(error(np.array(at, float)) for at in itertools.product(*levels)))
    ratios = np.array(found) / np.array(best)
    assert (ratios >= 1 - 1e-4).all()
    assert np.median(ratios) < 1.05
    assert ratios.max() < 1.2


def test_forms_that_are_worth_another_look():
    """Those that are cheapest where the error is half of the kernel's share that is left, and that of others whole."""
    model = net()
    graph = trace(model, IMAGES[:1])
    choices = offered(model, graph, graph.keep_all())
    cost = MixedModel(graph, choices)
    counts = np.array([max(1, 2 * g.channels // 3) for g in graph.groups], float)
    prices = np.array([1e-6, 0.0])
    found = cost.promising(counts, prices)
    sizes, few = cost._sizes(counts), 0
    for n, own in enumerate(choices):
        spent = cost._costs(n, sizes) @ prices
        whole = [spent[0], *(s + c.error for s, c in zip(spent[1:], own.chains, strict=True))]
        into, out = cost._ends.of(sizes)[n] / cost._ends.of(cost._sizes(cost.whole))[n]
        best = np.array([s + into * out / 2 * c.error for s, c in zip(spent[1:], own.chains, strict=True)])
        assert found[own.layer.name] == {c.form for c, b in zip(own.chains, best, strict=True) if b <= min(whole)}
        few += len(found[own.layer.name]) < len({c.form for c in own.chains})
    assert any(found.values())
    assert few


def test_only_the_forms_asked_for():
    model = net()
    graph = trace(model, IMAGES[:1])
    layer = graph.layer("a2")
    known = metrics_of(Moments(model, IMAGES, Sampling(per_unknown=10**6)), [layer], weighted=False)
    every, some, none = (
        chains_of(graph, layer, model.a2.weight, known["a2"], graph.keep_all(), True, forms=forms)
        for forms in (None, {"o|ihw"}, ())
    )
    assert {c.form for c in some} == {"o|ihw"}
    assert {c for c in every if c.form == "o|ihw"} <= set(some)
    assert none == []


def test_chains_of_a_layer():
    """Cheaper than the layer, each with less error than all that are cheaper, and the errors are those of the fit."""
    model = net()
    graph = trace(model, IMAGES[:1])
    keep = graph.keep_all()
    keep[graph.group("a1").start : graph.group("a1").start + 5] = False
    layer = graph.layer("a2")
    known = metrics_of(Moments(model, IMAGES, Sampling(per_unknown=10**6)), [layer], weighted=False)
    found = chains_of(graph, layer, model.a2.weight, known["a2"], keep, relative=True)
    macs = [value(chain.macs, 11, 12) for chain in found]
    assert macs == sorted(macs, reverse=True)
    assert macs[0] < value(dense_cost(graph, layer)[0], 11, 12) == 144 * 12 * 11 * 9
    assert [c.error for c in found] == sorted(c.error for c in found)
    assert len({chain.form for chain in found}) >= 3
    small = nn.Conv2d(11, 12, 3, padding=1)
    with torch.no_grad():
        small.weight.copy_(model.a2.weight[:, 5:])
    metric = restricted(known["a2"], graph, layer, keep)
    for chain in found[::5]:
        factors = convpare.factorize.factorize(small, chain.form, (chain.rank,), metric)
        exact = chain.form.startswith("o|")
        assert factors.details["output_error"] == pytest.approx(chain.error, rel=1e-3 if exact else 0.5, abs=2e-3)


def test_only_layers_that_a_chain_can_replace():
    model = net()
    names = [layer.name for layer in factorizable(model, trace(model, IMAGES[:1]))]
    assert names == ["stem", "a1", "a2", "b1", "b2", "deep", "down", "head"]


class Grouped(nn.Module):
    """Groups of several channels, depthwise kernels wide enough to split, and a multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.grouped = nn.Conv2d(24, 32, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(32, 64, (7, 5), padding=3, groups=32)
        self.up = nn.ConvTranspose2d(64, 16, 2, stride=2, groups=4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.grouped(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.up(torch.relu(self.deep(y)))).mean((2, 3)))


def grouped() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model = Grouped().eval()
    return model, trace(model, IMAGES[:2])


def test_what_grouped_layers_cost():
    """As chains and as they are, for any counts: what `planned_cost` says."""
    model, graph = grouped()
    choices = offered(model, graph, graph.keep_all())
    assert [c.layer.name for c in choices] == ["stem", "grouped", "deep", "head"]
    assert all(c.chains for c in choices[1:3])
    cost, rng = MixedModel(graph, choices), np.random.default_rng(0)
    for _ in range(12):
        counts = np.array([rng.integers(max(1, g.channels // 2), g.channels + 1) for g in graph.groups], float)
        keep = keep_of(graph, {g.name: rng.permutation(g.channels) for g in graph.groups}, counts)
        at = [int(rng.integers(0, 1 + len(c.chains))) for c in choices]
        edits = [
            Factorize(c.layer.name, c.chains[i - 1].form, (c.chains[i - 1].rank,), ())
            for c, i in zip(choices, at, strict=True) if i
        ]  # fmt: skip
        expected = planned_cost(graph, keep, edits)
        found = cost.with_chains(counts, at)
        assert found == pytest.approx({"macs": expected.macs, "params": expected.params}, rel=1e-12)


@pytest.mark.parametrize("name", ["grouped", "deep"])
def test_the_error_of_chains_of_grouped_layers(name: str):
    """Of what removals leave: what the fitted chain loses at this layer's output, as a share of it."""
    model, graph = grouped()
    layer = graph.layer(name)
    keep = graph.keep_all()
    for group in graph.groups:
        keep[group.start + np.arange(0, group.channels, 3)] = False
    known = metrics_of(Moments(model, IMAGES, Sampling(per_unknown=10**6)), [layer], weighted=True)[name]
    left = restricted(known, graph, layer, keep)
    weight = model.get_submodule(name).weight
    into, out = (torch.as_tensor(graph.kept(axis, keep)) for axis in (layer.into, layer.out))
    left_weight = weight.index_select(layer.in_axis, into).index_select(layer.out_axis, out)
    groups = len(left.inputs)
    assert groups == (2 if name == "grouped" else len(out) // 2)
    small = nn.Conv2d(left_weight.shape[1] * groups, len(out), left_weight.shape[2:], groups=groups)
    with torch.no_grad():
        small.weight.copy_(left_weight)
    found = chains_of(graph, layer, weight, known, keep, relative=True)
    assert found
    for chain in found:
        factors = convpare.factorize.factorize(small, chain.form, (chain.rank,), left)
        exact = chain.form.startswith("o|")
        assert factors.details["output_error"] == pytest.approx(chain.error, rel=1e-3 if exact else 0.5, abs=2e-3)


@pytest.mark.parametrize("methods", [("factorize",), ("prune", "factorize")])
def test_a_plan_for_grouped_layers(methods: tuple[str, ...]):
    model, _ = grouped()
    made = convpare.plan(model, IMAGES[:2], IMAGES, macs=0.5, criterion="sensitivity", options=mixed(*methods))
    assert {edit.layer for edit in made.factorizations} & {"grouped", "deep"}
    assert made.achieved["macs"] <= 0.5
    small = convpare.apply(model, made, IMAGES)
    assert count(small, IMAGES[:2]).total == made.after
    done = convpare.recovery.calibrate.recover_with(small, model, IMAGES)
    assert done.errors["least-squares"] < done.errors["none"]


@pytest.mark.parametrize("criterion", ["reconstruction", "sensitivity"])
@pytest.mark.parametrize("methods", [("factorize",), ("prune", "factorize")])
def test_within_the_budgets(methods: tuple[str, ...], criterion: str):
    model = net()
    made = convpare.plan(model, IMAGES[:2], IMAGES, macs=0.5, params=0.55, criterion=criterion, options=mixed(*methods))
    assert made.achieved["macs"] <= 0.5
    assert made.achieved["params"] <= 0.55
    assert made.factorizations
    assert bool(made.edits) == ("prune" in methods)
    small = convpare.apply(model, made, IMAGES)
    assert count(small, IMAGES[:2]).total == made.after
    assert Plan.from_json(made.to_json()) == made
    assert made.options["methods"] == list(methods)


@pytest.mark.parametrize("criterion", ["reconstruction", "sensitivity"])
def test_together_they_lose_less_than_alone(criterion: str):
    """By the plan's own prediction; and in what the network puts out after calibration, where that is predicted.

    By reconstruction, which predicts the errors of layers, removals alone come nearer to this network's output.
    """
    model = net()
    errors, outputs = {}, {}
    with torch.no_grad():
        wanted = model(IMAGES)
    for methods in (("prune",), ("factorize",), ("prune", "factorize")):
        made = convpare.plan(model, IMAGES[:1], IMAGES, macs=0.45, criterion=criterion, options=mixed(*methods))
        errors[methods] = made.error
        small = convpare.recover(convpare.apply(model, made, IMAGES), model, IMAGES)
        with torch.no_grad():
            outputs[methods] = float((small(IMAGES) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())
    assert errors["prune", "factorize"] < min(errors["prune",], errors["factorize",])
    if criterion == "sensitivity":
        assert outputs["prune", "factorize"] < outputs["prune",]


def test_chains_alone_are_the_best_there_are():
    """Against all choices, written out."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 1)).eval()
    graph = trace(model, IMAGES[:1])
    options = PlanOptions(methods=("factorize",), images=96)
    made = convpare.plan(model, IMAGES[:1], IMAGES, macs=0.6, criterion="reconstruction", options=options)
    choices = offered(model, graph, graph.keep_all())
    best = min(
        (sum(c.error for c in at if c is not None), at)
        for at in itertools.product(*([None, *c.chains] for c in choices))
        if planned_cost(
            graph,
            graph.keep_all(),
            [Factorize(x.layer.name, c.form, (c.rank,), ()) for x, c in zip(choices, at, strict=True) if c is not None],
        ).macs
        <= 0.6 * made.before.macs
    )[0]
    assert sum(edit.error for edit in made.factorizations) == pytest.approx(best, rel=1e-4)


def test_fitted_to_images_is_better_than_to_weights():
    model = net()
    made = convpare.plan(model, IMAGES[:1], IMAGES, macs=0.4, criterion="reconstruction", options=mixed("factorize"))
    with torch.no_grad():
        wanted = model(IMAGES)
        errors = [float((convpare.apply(model, made, data)(IMAGES) - wanted).square().sum()) for data in (IMAGES, None)]
    assert errors[0] < 0.8 * errors[1]


def test_compress_does_all_of_it(tmp_path: Path):
    model = net()
    done = compress(
        model, IMAGES[:1], IMAGES, macs=0.5, criterion="reconstruction",
        options=CompressOptions(plan=mixed("prune", "factorize")),
    )  # fmt: skip
    assert done.check.passed
    assert done.recovered is not None
    assert list(done.tried) == ["prune and factorize", "prune", "factorize"]
    assert min(done.tried.values()) == done.recovered.errors[done.recovered.method]
    best = min(done.tried, key=lambda name: done.tried[name])
    assert bool(done.plan.factorizations) == ("factorize" in best)
    assert bool(done.plan.edits) == ("prune" in best)
    assert count(done.model, IMAGES[:1]).total == done.plan.after
    convpare.save(done.model, tmp_path / "small", plan=done.plan)
    assert torch.equal(convpare.load(tmp_path / "small", net)(IMAGES), done.model(IMAGES))


def test_what_one_method_cannot_reach_the_others_can():
    model = net()
    done = compress(
        model, IMAGES[:1], IMAGES, macs=0.06, criterion="reconstruction",
        options=CompressOptions(plan=mixed("prune", "factorize")),
    )  # fmt: skip
    assert "factorize" not in done.tried
    assert done.plan.achieved["macs"] <= 0.06


def test_what_cannot_be_planned_says_so():
    model = net()
    with pytest.raises(ConvpareError, match=r"criterion l2 .* take reconstruction or sensitivity"):
        convpare.plan(model, IMAGES[:1], IMAGES, macs=0.5, criterion="l2", options=mixed("factorize"))
    with pytest.raises(ConvpareError, match=r"infeasible: macs 0.001 was asked for, at best 0\.\d+ can be reached"):
        convpare.plan(model, IMAGES[:1], IMAGES, macs=0.001, criterion="reconstruction", options=mixed("factorize"))
    for wrong, message in (
        ({"methods": ()}, "expected prune, factorize, or both"),
        ({"methods": ("quantize",)}, "expected prune, factorize, or both"),
        ({"methods": ("prune", "prune")}, "expected prune, factorize, or both"),
        ({"methods": ("factorize",), "rounds": 2}, "give no threshold and no rounds"),
        ({"methods": ("factorize",), "threshold": 0.1}, "give no threshold and no rounds"),
    ):
        with pytest.raises(ConvpareError, match=message):
            PlanOptions(**wrong)
    made = convpare.plan(model, IMAGES[:1], IMAGES, macs=0.5, criterion="reconstruction", options=mixed("factorize"))
    with pytest.raises(ConvpareError, match="option images is 'all'"):
        convpare.apply(model, replace(made, options={**made.options, "images": "all"}), IMAGES)


class Attending(nn.Module):
    """A projection whose weight its owner reads, and a layer that a forward looks into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mid, self.head = nn.Conv2d(16, 24, 3), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        tokens = y.flatten(2).transpose(1, 2)
        y = y + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(y.shape)
        return self.head(torch.relu(self.mid(y)).mean((2, 3))) / self.mid.out_channels


def test_layers_that_no_chain_can_replace():
    """One does not run as a module and is no candidate; the other fails the check, and is left as it is."""
    torch.manual_seed(0)
    model = Attending().eval()
    options = CompressOptions(plan=mixed("factorize"), recover=None)
    done = compress(model, IMAGES[:1], IMAGES, macs=0.97, criterion="reconstruction", options=options)
    assert {edit.layer for edit in done.plan.factorizations} <= {"stem", "head"}
    assert done.excluded == ("mid",)
    assert done.check.passed
    assert done.plan.achieved["macs"] <= 0.97


def test_the_gap_is_told():
    made = convpare.plan(net(), IMAGES[:1], IMAGES, macs=0.5, criterion="reconstruction", options=mixed("factorize"))
    assert 0 <= made.options["gap"] <= 1e-5


def test_keep_of():
    graph = trace(net(), IMAGES[:1])
    group = graph.group("a1")
    orders = {g.name: np.arange(g.channels)[::-1] for g in graph.groups}
    counts = np.array([g.channels - 3 * (g.name == "a1") for g in graph.groups])
    keep = keep_of(graph, orders, counts)
    assert np.flatnonzero(~keep).tolist() == [group.start + 13, group.start + 14, group.start + 15]
