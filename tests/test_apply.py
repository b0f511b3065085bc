"""Surgery as the plan says, on a copy, proved; and a rule that is wrong is found out and named."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convpare
from convpare.apply import FailedCheck, apply, carry_out, graph_for, plan_of, with_plan
from convpare.blocks import digits_net
from convpare.errors import ConvpareError
from convpare.graph import trace
from convpare.graph.grouping import assemble
from convpare.graph.rules import RULES
from convpare.planning.plan import Plan
from convpare.planning.planner import plan
from convpare.planning.settings import PlanOptions

X = torch.zeros(2, 1, 8, 8)


def digits() -> nn.Module:
    torch.manual_seed(0)
    return digits_net().eval()


def halved(model: nn.Module, x: Tensor = X, **options: object) -> Plan:
    return plan(model, x, macs=0.5, criterion="l2", options=PlanOptions(**options))  # type: ignore[arg-type]


def test_a_smaller_copy():
    model = digits().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = halved(model, scope="all")
    small, check = carry_out(model, made)
    assert check is not None
    assert check.passed
    assert type(small) is type(model)
    assert small.training
    assert plan_of(small) == made
    assert plan_of(model) is None
    assert plan_of(copy.deepcopy(small)) == made
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for edit in made.edits:
        producer = trace(model, X).group(edit.group).producers[0]
        kept = model.get_submodule(producer).weight[list(edit.keep)]
        assert small.get_submodule(producer).weight.shape[0] == kept.shape[0]
    twin = apply(model, made, graph=trace(model, X), check=False)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in small.state_dict().items())
    assert carry_out(model, made, check=False)[1] is None
    assert convpare.apply is apply


def test_a_plan_of_nothing():
    model = digits()
    made = plan(model, X, macs=1.0, criterion="l2")
    small, check = carry_out(model, made)
    assert check is not None
    assert check.max_relative_error == 0
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in model.state_dict().items())


def test_again_and_again():
    model = digits()
    first = apply(model, halved(model))
    second = apply(first, halved(first))
    assert plan_of(second) is not plan_of(first)
    assert plan_of(second).before == plan_of(first).after  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_model_is_traced_for_the_plans_shapes(dtype: torch.dtype):
    model = digits().to(dtype)
    made = halved(model, X.to(dtype))
    assert graph_for(model, made).inputs == ((2, 1, 8, 8),)
    small, check = carry_out(model, made)
    assert check is not None
    assert check.passed
    assert next(small.parameters()).dtype is dtype


def test_plans_can_be_hung_on():
    model, made = digits(), halved(digits())
    assert with_plan(model, None) is model
    assert plan_of(model) is None
    assert plan_of(with_plan(model, made)) == made
    model.__dict__["_convpare_plan"] = "no plan"
    assert plan_of(model) is None


class Flipped(nn.Module):
    """The second layer's channels are read in reverse order; the others are sound."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 10, 1)
        self.d = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.flip(F.relu(self.b(F.relu(self.a(x)))), [1])
        return self.d(F.relu(self.c(y)))


@pytest.fixture
def wrong_rule(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the trace believe that a flip leaves channels where they are."""
    return lambda: monkeypatch.setitem(RULES, "aten.flip", lambda t, x, dims: x)


def test_a_wrong_rule_is_found_out(wrong_rule: Callable[[], None]):
    torch.manual_seed(0)
    model = Flipped().eval()
    made = halved(model, scope="all", allocation="uniform")
    assert {e.group for e in made.edits} == {"a", "b", "c"}
    assert carry_out(model, made)[1].passed  # type: ignore[union-attr]
    wrong_rule()
    made = halved(model, scope="all", allocation="uniform")
    assert {e.group for e in made.edits} == {"a", "b", "c"}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        FailedCheck, match=r"self-check FAILED: relative error .* Nothing was changed. Wrong: b. Exclude"
    ) as caught:
        apply(model, made)
    assert caught.value.groups == ("b",)
    assert not caught.value.check.passed
    assert isinstance(caught.value, ConvpareError)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert plan_of(model) is None
    wrong = apply(model, made, check=False)
    assert wrong.b.out_channels < 8
    rest = made.without(["b"], trace(model, X))
    assert carry_out(model, rest)[1].passed  # type: ignore[union-attr]


class Together(nn.Module):
    """Wrong only where both groups lose channels: the output is multiplied by a number taken from both widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 6, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.last(torch.cat([a, b], 1)) * (1 + (4 - a.shape[1]) * (6 - b.shape[1]))


def test_edits_that_fail_only_together(monkeypatch: pytest.MonkeyPatch):
    model = Together()
    assert not trace(model, X).groups  # the trial surgery finds the number that follows the widths
    monkeypatch.setattr(sys.modules["convpare.graph.trace"], "settled", lambda _, record: assemble(record))
    made = halved(model, allocation="uniform")
    assert len(made.edits) == 2
    with pytest.raises(FailedCheck, match="Wrong: no single edit, only all together") as caught:
        apply(model, made)
    assert caught.value.groups == ()


def test_a_plan_for_another_model():
    made = halved(digits())
    with pytest.raises(
        ConvpareError, match=r"another network than this Sequential: it has no group 'block1.conv1'; it has no group"
    ):
        apply(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)), made)
    with pytest.raises(ConvpareError, match="does not run on inputs of shape"):
        apply(nn.Conv2d(3, 4, 3), made)
    wider = digits()
    wider.block1.conv1, wider.block1.bn1 = nn.Conv2d(32, 40, 3, padding=1), nn.BatchNorm2d(40)
    wider.block1.conv2 = nn.Conv2d(40, 32, 3, padding=1)
    with pytest.raises(ConvpareError, match=r"its group 'block1.conv1' has 40 channels, the plan's 32"):
        apply(wider, made)
