"""Training after calibration: what it gains, what it looks at, and that it can be stopped."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convpare
from convpare.blocks.digits import train_digits
from convpare.data import Data
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.recovery import RecoverOptions, recover_with, training, tuning
from convpare.recovery.features import Features, heard
from convpare.recovery.tuning import USUAL, TuneOptions, suitable, tune

FEW = TuneOptions(epochs=2, images=200)


@pytest.fixture(scope="module")
def digits() -> Data:
    return convpare.load_data("digits")


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return train_digits()[0]


@pytest.fixture(scope="module")
def small(teacher: nn.Module, digits: Data) -> nn.Module:
    plan = convpare.plan(teacher, torch.zeros(1, 1, 8, 8), macs=0.2, criterion="l2")
    return recover_with(convpare.apply(teacher, plan), teacher, digits).model


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    other = b.state_dict()
    return [name for name, value in a.state_dict().items() if not torch.equal(value, other[name])]


def test_training_brings_the_outputs_nearer(small: nn.Module, teacher: nn.Module, digits: Data):
    before = copy.deepcopy(small)
    done = tune(small, teacher, digits, options=TuneOptions(epochs=20, training=USUAL))
    assert not differing(small, before)
    assert done.errors[1] < 0.75 * done.errors[0]
    assert evaluate(done.model, digits.evaluation).top1 >= evaluate(small, digits.evaluation).top1
    assert (done.images, done.passes, done.labelled) == (1298, 25960, False)
    assert [record.number for record in done.history] == list(range(1, 21))
    assert done.to_json()["gradient_passes"] == 25960


def test_labels_are_looked_at_only_when_asked(small: nn.Module, teacher: nn.Module, digits: Data):
    split = digits.train.split
    assert split.labels is not None
    wrong = replace(digits, train=replace(digits.train, split=replace(split, labels=split.labels.flip(0))))
    without = [tune(small, teacher, data, options=FEW).model for data in (digits, wrong)]
    assert not differing(*without)
    labelled = [tune(small, teacher, data, labels=True, options=FEW) for data in (digits, wrong)]
    assert differing(labelled[0].model, labelled[1].model)
    assert labelled[0].labelled
    with pytest.raises(ConvpareError, match="fine-tuning needs labelled images"):
        tune(small, teacher, digits.train.tensor(64), labels=True)


def test_recovery_with_training_is_calibration_and_then_training(small: nn.Module, teacher: nn.Module, digits: Data):
    plan = convpare.plan(teacher, torch.zeros(1, 1, 8, 8), macs=0.2, criterion="l2")
    surgery = convpare.apply(teacher, plan)
    found = recover_with(surgery, teacher, digits, options=RecoverOptions("distill", tune=FEW))
    assert found.tuned is not None
    assert found.method == "least-squares"
    assert not differing(found.model, tune(small, teacher, digits, options=FEW).model)


def test_a_training_that_was_stopped_goes_on(
    small: nn.Module, teacher: nn.Module, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "SAVED_EVERY", 0.0)
    whole = tune(small, teacher, digits, options=FEW)
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        tune(small, teacher, digits, options=FEW, checkpoint=path, on_step=stop)
    assert seen == [(1, 4), (2, 4), (3, 4)]
    again = tune(small, teacher, digits, options=FEW, checkpoint=path, on_step=lambda done, _: seen.append((done, 0)))
    assert seen[3:] == [(4, 0)]
    assert not differing(whole.model, again.model)
    assert [r.loss for r in whole.history] == [r.loss for r in again.history]


def test_minutes_become_passes(
    small: nn.Module, teacher: nn.Module, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a clock by which a step takes a second: 1,298 images are 11 steps of 128."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: float(next(ticks)))
    found = {}
    for minutes in (0.1, 0.2, 0.4):
        student, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits.train.tensor(1298)
        objective = tuning.Imitation.of(teacher, images)
        options = TuneOptions(minutes=minutes)
        monkeypatch.setattr(tuning, "train_", _stepping)
        chosen, count = tuning._within(student, images, None, USUAL, objective, options, None)
        found[minutes] = (chosen.epochs, count)
    assert found == {0.1: (1, 6 * 128), 0.2: (1, 1298), 0.4: (2, 1298)}


def test_minutes_hold_for_fewer_images_than_a_batch(small: nn.Module, teacher: nn.Module, digits: Data):
    done = tune(small, teacher, digits, options=TuneOptions(minutes=0.05, images=40))
    assert done.images == 36
    assert len(done.history) > 5


def test_another_way_does_not_go_on_where_one_was_stopped(
    small: nn.Module, teacher: nn.Module, digits: Data, tmp_path: Path
):
    tune(small, teacher, digits, options=FEW, checkpoint=tmp_path / "state")
    with pytest.raises(ConvpareError, match="of a training with other objective and labels"):
        tune(small, teacher, digits, labels=True, options=FEW, checkpoint=tmp_path / "state")


def test_other_features_do_not_go_on_either(small: nn.Module, teacher: nn.Module, digits: Data, tmp_path: Path):
    tune(small, teacher, digits, options=FEW, checkpoint=tmp_path / "state")
    with pytest.raises(ConvpareError, match=r"of a training with other objective;"):
        tune(small, teacher, digits, options=replace(FEW, features=0.5), checkpoint=tmp_path / "state")


def test_blocks_are_imitated_where_that_is_wanted(teacher: nn.Module, digits: Data):
    """On images that nothing was trained on blocks come nearer to the original's."""
    options = convpare.PlanOptions(scope="inner")
    plan = convpare.plan(teacher, torch.zeros(1, 1, 8, 8), macs=0.6, criterion="l2", options=options)
    small, images = convpare.apply(teacher, plan), digits.evaluation.tensor()
    shared = Features.shared(teacher, small, images)
    assert shared.names

    def error(model: nn.Module) -> float:
        with torch.no_grad(), heard(teacher.eval(), shared.names) as wanted, heard(model.eval(), shared.names) as got:
            teacher(images), model(images)
        return float(shared.error(got, wanted)) / len(images)

    found = [error(tune(small, teacher, digits, options=replace(FEW, features=x)).model) for x in (0.0, 3.0)]
    assert found[1] < found[0] < error(small)


def _stepping(*_, on_step, **__):
    for step in range(1, 5):
        on_step(step, 4)


def test_minutes_hold_when_training_goes_on(small: nn.Module, teacher: nn.Module, digits: Data, tmp_path: Path):
    path = tmp_path / "state"
    first = tune(small, teacher, digits, options=TuneOptions(minutes=0.01), checkpoint=path)
    again = tune(small, teacher, digits, options=TuneOptions(minutes=5), checkpoint=path)
    assert (again.images, len(again.history)) == (first.images, len(first.history))
    assert not differing(first.model, again.model)


class Sided(nn.Module):
    """Its classes are the brighter side of a picture; `still`: whatever lies at the border counts, too."""

    def __init__(self, still: bool) -> None:
        super().__init__()
        self.still = still

    def forward(self, x: Tensor) -> Tensor:
        if self.still:
            return torch.stack([x[..., :1].mean((1, 2, 3)), x[..., -1:].mean((1, 2, 3))], 1)
        return torch.stack([x[..., :8].mean((1, 2, 3)), x[..., 8:].mean((1, 2, 3))], 1)


def test_augmentation_is_what_the_original_does_not_mind():
    torch.manual_seed(0)
    sided = torch.zeros(64, 1, 16, 16)
    sided[:32, :, :, 2:6] = 1
    sided[32:, :, :, 10:14] = 1
    minds_flips = suitable(Sided(still=False), sided)
    assert (minds_flips.crop, minds_flips.flip) == (2, False)
    borders = torch.rand(64, 1, 16, 16)
    assert (suitable(Sided(still=True), borders).crop, suitable(Sided(still=True), borders).flip) == (0, False)
    even = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    assert suitable(even, torch.rand(64, 1, 16, 16)).flip
    assert suitable(nn.Conv2d(1, 2, 3), borders).crop == 0


def test_options_that_make_no_sense():
    for wrong, message in (
        ({"epochs": 1, "minutes": 1.0}, "give epochs or minutes, not both"),
        ({"epochs": 0}, "epochs is 0"),
        ({"minutes": float("inf")}, "minutes is inf"),
        ({"images": 1}, "images is 1"),
        ({"lr": -1.0}, "lr is -1"),
        ({"batch_size": 0}, "batch_size 0"),
    ):
        with pytest.raises(ConvpareError, match=message):
            TuneOptions(**wrong)
    assert TuneOptions(lr=0.5, batch_size=7).over(USUAL) == replace(USUAL, lr=0.5, batch_size=7)


def test_images_that_cannot_be_trained_on(small: nn.Module, teacher: nn.Module):
    with pytest.raises(ConvpareError, match="2 images at least"):
        tune(small, teacher, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ConvpareError, match="NaN or infinite"):
        tune(small, teacher, torch.full((8, 1, 8, 8), float("nan")))
