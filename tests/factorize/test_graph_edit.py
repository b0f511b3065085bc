"""Chains in the graph form: operators in the place of an operator."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_edit import FULL, HALF, X, edits_for, net, planned
from torch import Tensor, nn

import convpare
from convpare.compress import CompressOptions, compress
from convpare.errors import ConvpareError
from convpare.factorize.edit import chain_error, factorized, layer_of
from convpare.graph import removed, trace
from convpare.planning.cost import count, planned_cost
from convpare.planning.settings import PlanOptions


def graph_form(model: nn.Module) -> nn.Module:
    graph = trace(model, X, form="graph")
    return removed(model, graph, graph.keep_all())


@pytest.mark.parametrize("chosen", [FULL, HALF], ids=["full", "half"])
def test_as_in_the_module(chosen: dict[str, tuple[str, tuple[int, ...]]]):
    """The same kernels of every kind of layer, the same outputs; at full rank those of the network."""
    model = net()
    graph = trace(model, X)
    edits = edits_for(graph, graph.keep_all(), chosen)
    expected, _ = factorized(model, edits)
    form = graph_form(model)
    before = {name: x.clone() for name, x in form.state_dict().items()}
    small, factors = factorized(form, edits)
    assert all(torch.equal(x, before[name]) for name, x in form.state_dict().items())
    torch.testing.assert_close(small(X), expected(X), rtol=1e-5, atol=1e-6)
    assert chain_error(form, small, trace(model, X, form="graph"), factors) < 1e-13
    as_graph = trace(model, X, form="graph")
    assert count(small, X).total == planned_cost(as_graph, as_graph.keep_all(), edits)
    assert {n.rpartition(".")[0] for n, _ in small.named_parameters()} == {
        n.rpartition(".")[0] for n, _ in expected.named_parameters()
    }
    if chosen is FULL:
        torch.testing.assert_close(small(X), model(X), atol=1e-5, rtol=1e-5)


def test_a_plan_of_the_graph_form(tmp_path: Path):
    """Removals and chains: costed, proven, saved without any code of the network, loaded and trained."""
    model = net()
    made = convpare.plan(
        model, X, X, macs=0.5, criterion="reconstruction", options=PlanOptions(methods=("prune", "factorize")),
        graph=trace(model, X, form="graph"),
    )  # fmt: skip
    assert made.form == "graph"
    assert made.factorizations
    small = convpare.apply(model, made, X)
    assert count(small, X).total == made.after
    assert made.achieved["macs"] <= 0.5
    convpare.save(small, tmp_path / "small", plan=made)
    again = convpare.load(tmp_path / "small")
    assert torch.equal(again(X), small(X))
    again.train()
    (again(X) ** 2).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in again.parameters())


def test_a_plan_of_the_module_form_carried_out_in_the_graph_form():
    model = net()
    made = planned(model, 0.6, HALF)
    small, graph = convpare.apply(model, made), convpare.apply(model, made, form="graph")
    torch.testing.assert_close(graph(X), small(X), rtol=1e-4, atol=1e-5)


def test_compressed_and_recovered():
    model = net()
    images = torch.randn(64, *X.shape[1:], generator=torch.Generator().manual_seed(3))
    done = compress(
        model, X, images, macs=0.5, criterion="reconstruction",
        options=CompressOptions(plan=PlanOptions(methods=("prune", "factorize"), images=24), form="graph"),
    )  # fmt: skip
    assert done.check.passed
    assert done.plan.form == "graph"
    assert list(done.tried) == ["prune and factorize", "prune", "factorize"]
    assert count(done.model, X).total == done.plan.after


class Odd(nn.Module):
    """A weight that is read twice, in one way; another in two; one that is read by something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.ways = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.normed = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x)))
        x = self.ways(x) + F.conv2d(x, self.ways.weight, self.ways.bias, padding=2, dilation=2)
        return self.normed(x) / self.normed.weight.norm()


def test_weights_that_are_read_otherwise():
    torch.manual_seed(0)
    model = Odd().eval()
    form = graph_form(model)
    graph = trace(model, X)
    small, factors = factorized(form, edits_for(graph, graph.keep_all(), {"twice": ("o|ihw", (2,))}))
    assert chain_error(form, small, trace(model, X, form="graph"), factors) < 1e-13
    keep = graph.keep_all()
    assert count(small, X).total == planned_cost(graph, keep, edits_for(graph, keep, {"twice": ("o|ihw", (2,))}))
    with pytest.raises(ConvpareError, match="'ways' is called in several ways"):
        layer_of(form, "ways")
    with pytest.raises(ConvpareError, match="the weight of 'normed' is not that of a plain layer alone"):
        layer_of(form, "normed")
    with pytest.raises(ConvpareError, match="'tail' is no module"):
        layer_of(form, "tail")
