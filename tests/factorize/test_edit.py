"""Factorizations as edits of a plan: applied with removals, costed, proven, recovered, saved and loaded."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import convpare
from convpare.apply import FailedCheck
from convpare.errors import ConvpareError
from convpare.factorize import forms_of
from convpare.factorize.edit import Factorize, chain_error, factorized, layer_of, shape_in, truncated
from convpare.graph import Graph, removed, trace
from convpare.planning.cost import count, planned_cost, total_cost
from convpare.planning.plan import Plan
from convpare.recovery import LeastSquares, RecoverOptions
from convpare.recovery.least_squares import compensate_

X = torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Every kind of layer that a chain can replace, with a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, (3, 5), stride=(1, 2), padding=(1, 2), groups=2, bias=False)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=8)
        self.point = nn.Conv2d(16, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = self.grouped(y)
        y = y + self.point(torch.relu(self.depthwise(y)))
        return self.head(torch.relu(self.up(y)).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.3, 0.3)
        model.norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


FULL = {
    "stem": ("o|ihw", (8,)),
    "grouped": ("oh|iw", (12,)),
    "depthwise": ("oiw|h", (3,)),
    "point": ("i|ohw", (8,)),
    "up": ("tucker2", (6, 8)),
    "head": ("o|i", (5,)),
}
HALF = {
    "stem": ("tucker2", (3, 2)),
    "grouped": ("ow|ih", (3,)),
    "depthwise": ("oih|w", (1,)),
    "point": ("o|ihw", (3,)),
    "up": ("oi|hw", (3,)),
    "head": ("i|o", (2,)),
}


def edits_for(graph: Graph, keep: np.ndarray, chosen: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[Factorize, ...]:
    """Edits with ranks that suit what removals leave."""
    found = []
    for name, (form, ranks) in chosen.items():
        layer = graph.layer(name)
        shape = tuple(len(graph.kept((layer.weight, a), keep)) for a in range(len(graph.shapes[layer.weight])))
        full = convpare.factorize.get_form(form).full_ranks(shape_in(graph, layer, keep))
        found.append(Factorize(name, form, tuple(map(min, ranks, full)), shape))
    return tuple(found)


def planned(model: nn.Module, macs: float, chosen: dict[str, tuple[str, tuple[int, ...]]]) -> Plan:
    made = convpare.plan(model, X, macs=macs, criterion="l2")
    graph = trace(model, X)
    keep = made.keep(graph)
    edits = edits_for(graph, keep, chosen)
    return replace(made, factorizations=edits, after=planned_cost(graph, keep, edits))


def test_full_rank_is_the_same_function():
    model = net().double()
    graph = trace(model, X.double())
    edits = edits_for(graph, graph.keep_all(), FULL)
    small, factors = factorized(model, edits)
    assert {name: f.relative_error < 1e-12 for name, f in factors.items()} == dict.fromkeys(FULL, True)
    torch.testing.assert_close(small(X.double()), model(X.double()), rtol=1e-11, atol=1e-12)
    assert chain_error(model, small, graph, factors) < 1e-12


def test_the_chains_are_the_kernels_that_they_stand_for():
    model = net()
    graph = trace(model, X)
    small, factors = factorized(model, edits_for(graph, graph.keep_all(), HALF))
    assert chain_error(model, small, graph, factors) < 1e-13
    dense = truncated(model, factors)
    for name, found in factors.items():
        weight, kernel = dense.get_submodule(name).weight, found.kernel().weight(found.transposed)
        torch.testing.assert_close(weight, kernel.double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(small(X), model(X), rtol=1e-2)
    with torch.no_grad():
        small.up[1].weight.mul_(1 + 1e-6)
    assert chain_error(model, small, graph, factors) > 1e-9


@pytest.mark.parametrize("chosen", [FULL, HALF], ids=["full", "half"])
@pytest.mark.parametrize("macs", [1.0, 0.6])
def test_planned_cost_is_measured_cost(macs: float, chosen: dict[str, tuple[str, tuple[int, ...]]]):
    model = net()
    made = planned(model, macs, chosen)
    small = convpare.apply(model, made)
    found = count(small, X).total
    assert (found.macs, found.params, found.activations) == tuple(made.after)
    assert found.params == sum(p.numel() for p in small.parameters())
    assert small(X).shape == (3, 5)


@pytest.mark.parametrize("name", ["stem", "grouped", "depthwise", "point", "up", "head"])
def test_cost_of_every_form(name: str):
    """With some channels gone, at every form that this kernel can take."""
    model = net()
    graph = trace(model, X)
    made = convpare.plan(model, X, macs=0.7, criterion="l2", graph=graph)
    keep, layer = made.keep(graph), graph.layer(name)
    small = removed(model, graph, keep)
    tried = 0
    for form in forms_of(len(graph.shapes[layer.weight]) - 2):
        kernel = shape_in(graph, layer, keep)
        try:
            chosen = convpare.factorize.get_form(form)
            full = chosen.full_ranks(kernel)
            ranks = chosen.feasible(kernel, tuple(max(1, f // 2) for f in full))
            (edit,) = edits_for(graph, keep, {name: (form, ranks)})
            chained = factorized(small, [edit])[0]
        except ConvpareError:
            continue
        tried += 1
        assert count(chained, X).total == planned_cost(graph, keep, [edit]), form
    assert tried >= 3 or name in ("point", "head")
    assert tried >= 1


def test_a_plan_with_both_kinds_of_edits(tmp_path: Path):
    model = net()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = planned(model, 0.6, HALF)
    assert made.edits
    small = convpare.apply(model, made)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert type(small.stem) is nn.Sequential
    assert [type(m) for m in small.up] == [nn.Conv2d, nn.ConvTranspose2d]
    assert not small.training
    again = Plan.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    rows = str(made).splitlines()
    assert rows[-len(HALF) - 1].split() == ["layer", "weight", "becomes", "ranks"]
    assert rows[-1].split() == ["head", f"5×{small.head[0].in_features}", "i|o", "2"]
    convpare.save(small, tmp_path / "small", plan=made)
    loaded = convpare.load(tmp_path / "small", net)
    assert torch.equal(loaded(X), small(X))
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_what_was_saved_does_not_load_into_another_structure(tmp_path: Path):
    model = net()
    made = planned(model, 1.0, {"head": ("o|i", (2,))})
    convpare.save(convpare.apply(model, made), tmp_path / "small", plan=made)

    def other() -> nn.Module:
        built = net()
        built.head = nn.Identity()
        return built

    with pytest.raises(ConvpareError, match="does not fit this Net: a layer of type Identity cannot be factorized"):
        convpare.load(tmp_path / "small", other)


def test_errors():
    model = net()
    made = planned(model, 1.0, {"head": ("o|i", (2,))})
    (edit,) = made.factorizations
    for wrong, message in (
        (replace(edit, shape=(5, 7)), r"with a weight of \(5, 7\), in this network it is \(5, 6\)"),
        (replace(edit, layer="tail"), "has no convolution or linear layer 'tail'"),
        (replace(edit, layer="norm"), "has no convolution or linear layer 'norm'"),
        (replace(edit, ranks=(9,)), "full ranks of this kernel are"),
        (replace(edit, form="o|ihw"), "is no cut of a kernel with the indices oi"),
    ):
        with pytest.raises(ConvpareError, match=message):
            convpare.apply(model, replace(made, factorizations=(wrong,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": []}, "must have ranks and sizes of 1 or more"),
        ({"ranks": [0]}, "must have ranks and sizes of 1 or more"),
        ({"ranks": ["2"]}, "ranks is '2' in the plan"),
        ({"shape": [5]}, "must have ranks and sizes of 1 or more"),
        ({"form": "magic"}, "no form 'magic'"),
        ({"layer": 3}, "layer is 3 in the plan"),
        ({"error": "small"}, "error is 'small' in the plan"),
    ],
)
def test_plans_are_read_field_by_field(change: dict[str, Any], message: str):
    data = planned(net(), 1.0, {"head": ("o|i", (2,))}).to_json()
    data["edits"][-1] |= change
    with pytest.raises(ConvpareError, match=message):
        Plan.from_json(data)


def test_one_edit_a_layer():
    data = planned(net(), 1.0, {"head": ("o|i", (2,))}).to_json()
    data["edits"] = [data["edits"][-1]] * 2
    with pytest.raises(ConvpareError, match="edits layer 'head' 2 times"):
        Plan.from_json(data)


def test_shared_and_computed_weights_stay():
    model = net()
    model.twin = nn.Conv2d(16, 8, 1)
    model.twin.weight = model.point.weight
    with pytest.raises(ConvpareError, match="the weight of 'point' is also that of 'twin'"):
        layer_of(model, "point")
    nn.utils.parametrizations.weight_norm(model.stem)
    with pytest.raises(ConvpareError, match="the weight of 'stem' is computed from others"):
        layer_of(model, "stem")


def test_a_layer_that_stands_in_two_places_is_replaced_in_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 3, padding=1)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Twice().eval()
    graph = trace(model, X)
    small, factors = factorized(model, edits_for(graph, graph.keep_all(), {"a": ("o|ihw", (2,))}))
    assert small.a is small.b
    assert chain_error(model, small, graph, factors) < 1e-13
    assert count(small, X).total == planned_cost(
        graph, graph.keep_all(), edits_for(graph, graph.keep_all(), {"a": ("o|ihw", (2,))})
    )


def test_a_forward_that_looks_into_the_layer_is_named():
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.b.out_channels

    model = Looks().eval()
    graph = trace(model, X)
    made = planned(model, 1.0, {"a": ("o|ihw", (3,)), "b": ("o|ihw", (1,))})
    with pytest.raises(FailedCheck) as failed:
        convpare.apply(model, made, graph=graph)
    assert failed.value.groups == ("b",)


@pytest.mark.parametrize("macs", [1.0, 0.7])
def test_recovery_fits_the_last_layer_of_a_chain(macs: float):
    """Least squares lower the error of the outputs, and find the original again where the chain has its full rank."""
    model = net()
    images = torch.randn(64, 4, 12, 12, generator=torch.Generator().manual_seed(2))
    some = {name: HALF[name] for name in ("stem", "grouped", "point", "head")}
    made = planned(model, macs, some)
    small = convpare.apply(model, made)
    options = RecoverOptions(method="least-squares", images=64, least_squares=LeastSquares(ridge=1e-8))
    better = convpare.recover(small, model, images, options=options)
    fresh = torch.randn(64, 4, 12, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model(fresh)
        errors = [float((net_(fresh) - wanted).square().sum()) for net_ in (small, better)]
    assert errors[1] < 0.7 * errors[0]
    assert not torch.equal(better.stem[-1].weight, small.stem[-1].weight)
    assert torch.equal(better.stem[0].weight, small.stem[0].weight)


def test_recovery_fits_all_of_a_chain_of_two():
    """The layer as it has to be now, factorized anew: better than the last layer of the chain alone can do."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)
    ).eval()
    images = torch.randn(128, 4, 12, 12, generator=torch.Generator().manual_seed(2))
    graph = trace(model, images[:1])
    keep = graph.keep_all()
    keep[graph.group("0").start : graph.group("0").start + 3] = False
    edit = edits_for(graph, keep, {"2": ("oh|iw", (6,))})[0]
    small, _ = factorized(removed(model, graph, keep), [edit])
    errors = []
    for chains, kept in (
        ((edit,), False),
        ((replace(edit, form="tt:ihwo"),), True),
    ):  # the second: as it is not cut in two
        student = copy.deepcopy(small)
        told = compensate_(student, model, graph, keep, images, LeastSquares(ridge=1e-8), chains=chains)
        assert told.layers == ("2", "4")
        assert torch.equal(student[2][0].weight, small[2][0].weight) == kept
        with torch.no_grad():
            errors.append(float((student(images) - model(images)).square().sum()))
    assert errors[0] < 0.95 * errors[1]


def test_recovery_at_full_rank_finds_the_original():
    model = net()
    images = torch.randn(64, 4, 12, 12, generator=torch.Generator().manual_seed(2))
    made = planned(model, 1.0, {name: FULL[name] for name in ("stem", "grouped", "point", "head")})
    small = convpare.apply(model, made)
    with torch.no_grad():
        for name in ("stem", "grouped", "point", "head"):
            small.get_submodule(name)[-1].weight.mul_(0.5)
    options = RecoverOptions(method="least-squares", images=64, least_squares=LeastSquares(ridge=1e-9))
    better = convpare.recover(small, model, images, options=options)
    torch.testing.assert_close(better(X), model(X), rtol=1e-3, atol=1e-3)


def test_the_cost_without_factorizations_is_that_of_the_removals():
    graph = trace(net(), X)
    assert planned_cost(graph, graph.keep_all()) == total_cost(graph, graph.keep_all())
