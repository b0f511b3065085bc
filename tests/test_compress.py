"""The whole job: what is reported is what was done, what fails stays whole, and labels serve for accuracy alone."""

import json
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.apply import FailedCheck, plan_of
from convpare.blocks import digits_net
from convpare.compress import CompressOptions, compress
from convpare.data import Data, ImageSet, Preprocessing
from convpare.data.splits import ArrayPixels, Split
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.graph.grouping import assemble
from convpare.graph.rules import RULES
from convpare.planning.cost import count
from convpare.planning.settings import PlanOptions
from convpare.recovery import RecoverOptions, recalibrate_

X = torch.zeros(1, 1, 8, 8)


def data(labels: bool = True, test: bool = True) -> Data:
    """Noise with labels that mean nothing; what is not asked for is poisoned."""
    generator = torch.Generator().manual_seed(0)
    preprocessing = Preprocessing((0.5,), (0.3,))

    def images(name: str, n: int, known: bool) -> ImageSet:
        pixels = ArrayPixels(name, torch.rand(n, 1, 8, 8, generator=generator))
        classes = torch.randint(0, 10, (n,), generator=generator)
        return ImageSet(name, Split(pixels, classes if known else None), preprocessing, 10 if known else None)

    train = images("train", 200, False)  # calibration cannot have seen labels
    return Data("noise", preprocessing, train, images("test", 40, labels) if test else None, 10, (), "")


def digits() -> nn.Module:
    torch.manual_seed(0)
    model = digits_net().eval()
    recalibrate_(model, [data().train.tensor()])
    return model


FAST = CompressOptions(PlanOptions(images=32), RecoverOptions(images=100))


def test_what_is_reported_is_what_was_done():
    model, images = digits(), data()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    done = compress(model, X, images, macs=0.6, options=FAST)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert done.check.passed
    assert done.plan.criterion == "qsfm-ssim"
    assert done.plan.achieved["macs"] <= 0.6
    assert count(done.model, X).total == done.plan.after
    assert plan_of(done.model) == done.plan
    assert done.recovered is not None
    assert [s.name for s in done.stages] == ["before", "surgery", done.recovered.method]
    assert done.stages[0].top1 == evaluate(model, images.test).top1
    assert done.stages[-1].top1 == evaluate(done.model, images.test).top1
    assert done.stages[0].seconds == 0
    assert all(s.seconds > 0 for s in done.stages[1:])
    assert done.test_images == 40
    assert done.excluded == ()
    assert done.recovered.images == 100


def test_json():
    done = compress(digits(), X, data(), macs=0.6, params=0.7, criterion="l2", options=FAST)
    told = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert set(told) == {
        "model", "form", "criterion", "options", "requested", "achieved", "before", "after", "stages", "self_check",
        "recovery", "excluded", "test_images", "tried", "latency", "sweep",
    }  # fmt: skip
    assert told["model"] == "DigitsNet"
    assert told["criterion"] == "l2"
    assert told["requested"] == {"macs": 0.6, "params": 0.7}
    assert told["achieved"] == done.plan.achieved
    for side, cost, stage in (("before", done.plan.before, 0), ("after", done.plan.after, -1)):
        assert told[side]["macs"] == cost.macs
        assert told[side]["params"] == cost.params
        assert told[side]["top1"] == done.stages[stage].top1
        assert set(told[side]) == {"macs", "params", "activations", "top1"}
    assert [set(stage) for stage in told["stages"]] == [{"name", "top1", "seconds"}] * 3
    assert told["self_check"]["passed"] is True
    assert 0 <= told["self_check"]["max_relative_error"] <= 1e-9
    assert told["recovery"]["labels"] is False
    assert told["recovery"]["gradient_passes"] == 0
    assert told["recovery"]["images"] == 100
    assert set(told["recovery"]["relative_output_errors"]) == {"none", "batch-norm", "least-squares"}
    assert told["excluded"] == []
    assert told["test_images"] == 40


@pytest.mark.parametrize("methods", [("prune",), ("prune", "factorize")])
def test_the_trade_off_is_that_of_the_plan_that_was_taken(methods: tuple[str, ...]):
    plan = PlanOptions(images=32, methods=methods)
    asked = CompressOptions(plan, RecoverOptions(images=100), sweep=3)
    done = compress(digits(), X, data(), macs=0.6, criterion="reconstruction", options=asked)
    assert done.sweep is not None
    assert [step.macs for step, _, _ in done.sweep.steps] == pytest.approx([1 - 0.4 / 3, 1 - 0.8 / 3, 0.6])
    assert done.sweep.plans[-1] == done.plan
    assert done.sweep.before == done.plan.before
    told = done.to_json()["sweep"]
    assert [step["achieved"] for step in told["steps"]] == [made.achieved for made in done.sweep.plans]
    assert all("plan" not in step for step in told["steps"])


@pytest.mark.parametrize("plan", [PlanOptions(threshold=0.1), PlanOptions(rounds=2)])
def test_no_trade_off_by_a_threshold_or_in_rounds(plan: PlanOptions):
    budget = None if plan.threshold is not None else 0.7
    done = compress(digits(), X, macs=budget, criterion="l2", options=CompressOptions(plan, None, sweep=3))
    assert done.sweep is None


def test_without_labels_there_is_no_accuracy():
    for images in (data(labels=False), data(test=False), data().train, data().train.tensor()):
        done = compress(digits(), X, images, macs=0.7, criterion="l2", options=FAST)
        assert [stage.top1 for stage in done.stages] == [None] * 3
        assert done.to_json()["after"]["top1"] is None
        assert done.test_images == 0


@pytest.mark.parametrize("recover", [None, RecoverOptions("none")])
def test_without_recovery(recover: RecoverOptions | None):
    options = CompressOptions(recover=recover, test_limit=7)
    done = compress(digits(), X, data(), macs=0.7, criterion="l2", options=options)
    assert [stage.name for stage in done.stages] == ["before", "surgery"]
    assert done.recovered is None
    assert done.to_json()["recovery"] is None
    assert done.test_images == 7
    bare = compress(digits(), X, macs=0.7, criterion="l2", options=options)  # and then without images
    assert bare.plan == done.plan


def test_recovery_is_not_silently_left_out():
    with pytest.raises(ConvpareError, match=r"recovery needs images: give data, or CompressOptions\(recover=None\)"):
        compress(digits(), X, macs=0.7, criterion="l2")


def test_progress():
    told: list[tuple[str, int, int]] = []
    done = compress(digits(), X, data(), macs=0.7, options=FAST, on_progress=lambda *step: told.append(step))
    names = list(dict.fromkeys(name for name, _, _ in told))
    assert names == [
        "tracing", "planning", "surgery and self-check", "recovery", "accuracy before", "accuracy surgery",
        f"accuracy {done.stages[-1].name}",
    ]  # fmt: skip
    assert all(0 <= part <= whole for _, part, whole in told)


class Flipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 10, 1)
        self.fc = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.flip(F.relu(self.b(F.relu(self.a(x)))), [1])
        return self.fc(F.relu(self.c(y)).mean((2, 3)))


def compressed(model: nn.Module, **given: Any) -> Any:
    options = CompressOptions(PlanOptions(exclude=("c",), allocation="uniform"), FAST.recover)
    return compress(model, X, data(), criterion="l2", options=options, **given)


def test_groups_that_fail_stay_whole(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = Flipped().eval()
    sound = compressed(model, macs=0.6)
    assert {e.group for e in sound.plan.edits} == {"a", "b"}
    assert sound.excluded == ()
    monkeypatch.setitem(RULES, "aten.flip", lambda t, x, dims: x)
    done = compressed(model, macs=0.6)
    assert done.excluded == ("b",)
    assert done.to_json()["excluded"] == ["b"]
    assert {e.group for e in done.plan.edits} == {"a"}
    assert done.plan.options["exclude"] == ["c", "b"]
    assert done.plan.achieved["macs"] <= 0.6
    assert done.check.passed
    assert done.model.b.out_channels == 8
    with pytest.raises(ConvpareError, match=r"infeasible: macs 0.1 was asked for"):
        compressed(model, macs=0.1)


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = (
            nn.Conv2d(1, 4, 1),
            nn.Conv2d(1, 6, 1),
            nn.Conv2d(10, 10, 1),
            nn.Linear(10, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = self.c(torch.cat([a, b], 1)) * (1 + (4 - a.shape[1]) * (6 - b.shape[1]))
        return self.fc(y.mean((2, 3)))


def test_what_fails_only_together_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["convpare.graph.trace"], "settled", lambda _, record: assemble(record))
    with pytest.raises(FailedCheck, match="no single edit"):
        compressed(Together().eval(), macs=0.6)


def test_errors_come_before_any_work():
    told: list[Any] = []
    with pytest.raises(ConvpareError, match="no criterion 'l7'"):
        compress(digits(), X, data(test=False), macs=0.5, criterion="l7", options=FAST)
    with pytest.raises(ConvpareError, match="recovery needs images"):
        compress(digits(), X, macs=0.7, criterion="l2", on_progress=lambda *step: told.append(step))
    assert told == []
