"""Merges as edits of a plan: planned, applied, saved, loaded, recovered."""

import json

import pytest
import torch
from torch import nn

import convpare
from convpare import CompressOptions, PlanOptions, RecoverOptions, compress
from convpare.data import load_data
from convpare.errors import ConvpareError
from convpare.graph.merging import merge_all
from convpare.planning.plan import Plan

EXAMPLE = torch.zeros(2, 1, 8, 8)


class Tuckers(nn.Module):
    """Two Tucker-2 kernels in a row: each expansion is read by the next 1×1 with nothing between, the second too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(6, 6, 3, padding=1, bias=False))
        self.expand1 = nn.Conv2d(6, 32, 1, bias=False)
        self.reduce = nn.Conv2d(32, 8, 1, bias=False)
        self.expand2 = nn.Conv2d(8, 40, 1, bias=False)
        self.norm = nn.BatchNorm2d(40)
        self.last = nn.Conv2d(40, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x).relu())
        x = self.last(self.norm(self.expand2(self.reduce(self.expand1(x)).relu()))).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Tuckers()
    net.norm.running_mean.uniform_(-1, 1)
    net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


def test_merges_alone_may_do(net):
    plan = convpare.plan(net, EXAMPLE, macs=0.9, criterion="l2", options=PlanOptions(merge=True))
    assert [(m.expansion, m.norm, m.consumers, m.k, m.r) for m in plan.merges] == [
        ("expand1", None, ("reduce",), 32, 6), ("expand2", "norm", ("last",), 40, 8),
    ]  # fmt: skip
    assert plan.edits == ()
    assert plan.before == convpare.count(net, EXAMPLE).total
    small = convpare.apply(net, plan)
    assert convpare.count(small, EXAMPLE).total == plan.after
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)
    assert isinstance(small.expand1, nn.Identity) and isinstance(net.expand1, nn.Conv2d)
    assert "expand1 (6 → 32) is merged into reduce" in str(plan)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_merges_and_removals(net, form, tmp_path):
    options = PlanOptions(merge=True, scope="all")
    graph = None
    if form == "graph":
        graph = convpare.trace(merge_all(net, EXAMPLE)[0], EXAMPLE, "graph")
    plan = convpare.plan(net, EXAMPLE, macs=0.2, criterion="l2", options=options, graph=graph)
    assert plan.merges and plan.edits and plan.form == form
    assert plan.achieved["macs"] <= 0.2
    assert plan.requested == {"macs": 0.2}
    small = convpare.apply(net, plan)
    assert convpare.count(small, EXAMPLE).total.macs == plan.after.macs
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    convpare.save(small, tmp_path / "small", plan=plan)
    again = convpare.load(tmp_path / "small", factory=Tuckers)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), small.eval()(x), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in small.state_dict().items())


def test_the_whole_job(net):
    data = load_data("digits")
    options = CompressOptions(PlanOptions(merge=True), RecoverOptions(images=128), test_limit=50)
    done = compress(net, EXAMPLE[:1], data, macs=0.5, criterion="l2", options=options)
    assert done.plan.merges and done.plan.achieved["macs"] <= 0.5
    assert done.check.passed
    assert done.recovered is not None and done.recovered.errors["least-squares"] <= done.recovered.errors["none"]


def test_a_plan_that_was_made_for_another_model(net):
    plan = convpare.plan(net, EXAMPLE, macs=0.9, criterion="l2", options=PlanOptions(merge=True))
    other = Tuckers().eval()
    other.expand1 = nn.Conv2d(6, 32, 1, groups=2)
    with pytest.raises(ConvpareError, match=r"expand1.*cannot be merged"):
        convpare.apply(other, plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expansion": 3}, "expansion"), ({"consumers": []}, "must name layers"), ({"r": 40}, "0 < r < k"),
        ({"norm": 1}, "norm"), ({"consumers": [1]}, "consumers"), ({"k": None}, "k"),
    ],
)  # fmt: skip
def test_a_hostile_merge(net, change, message):
    content = convpare.plan(net, EXAMPLE, macs=0.9, criterion="l2", options=PlanOptions(merge=True)).to_json()
    content["edits"][0] |= change
    with pytest.raises(ConvpareError, match=message):
        Plan.from_json(content)


def test_an_artifact_whose_merges_do_not_fit(net, tmp_path):
    plan = convpare.plan(net, EXAMPLE, macs=0.9, criterion="l2", options=PlanOptions(merge=True))
    convpare.save(convpare.apply(net, plan), tmp_path / "small", plan=plan)

    class Other(Tuckers):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = nn.Conv2d(7, 8, 1)

    Other.__name__ = "Tuckers"
    with pytest.raises(ConvpareError, match="do not allow for the merge of 'expand1'"):
        convpare.load(tmp_path / "small", factory=Other)
