import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convpare.data import load_data
from convpare.errors import ConvpareError
from convpare.evaluation import Evaluation, evaluate
from convpare.modes import eval_mode
from convpare.zoo import load_model


class Flat(nn.Module):
    """Gives its input back as the outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def outputs(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


def test_counts_by_hand():
    x = outputs([[0, 1, 2], [3, 1, 2], [0, 5, 2], [9, 1, 2]])
    result = evaluate(Flat(), [(x[:3], torch.tensor([2, 0, 0])), (x[3:], torch.tensor([0]))])
    assert (result.top1, result.top5, result.images) == (75.0, None, 4)


def test_top5_by_hand():
    x = -torch.arange(12.0).repeat(4, 1)[:, :, None, None]  # best is class 0, then 1, 2, ...
    result = evaluate(Flat(), [(x, torch.tensor([0, 4, 5, 11]))])
    assert (result.top1, result.top5) == (25.0, 50.0)


def test_agrees_with_torchmetrics():
    from torchmetrics.functional import accuracy

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 20, 1, 1, generator=generator), torch.randint(0, 20, (300,), generator=generator)
    result = evaluate(Flat(), [(x[:100], y[:100]), (x[100:], y[100:])])
    for k, ours in ((1, result.top1), (5, result.top5)):
        micro = accuracy(x[..., 0, 0], y, task="multiclass", num_classes=20, top_k=k, average="micro")
        assert ours == pytest.approx(100 * float(micro), abs=1e-4)


def test_text_and_json():
    result = Evaluation(93.391, 99.8, 10_000, 30.04)
    assert str(result) == "93.39 % top-1, 99.80 % top-5 on 10,000 images in 30.0 s"
    assert str(Evaluation(50.0, None, 2, 0.0)) == "50.00 % top-1 on 2 images in 0.0 s"
    assert json.loads(json.dumps(result.to_json())) == {
        "top1": 93.391, "top5": 99.8, "images": 10_000, "seconds": 30.04,
    }  # fmt: skip


def test_limit_and_progress():
    test = load_data("digits").test
    assert test is not None
    model = load_model("convpare:digits").module
    calls: list[tuple[int, int]] = []
    result = evaluate(model, test, limit=50, batch_size=20, on_progress=lambda d, t: calls.append((d, t)))
    assert result.images == 50
    assert calls == [(20, 50), (40, 50), (50, 50)]
    batches = list(test.batches(20))
    calls.clear()
    limited = evaluate(model, batches, limit=50, on_progress=lambda d, t: calls.append((d, t)))
    assert limited.images == 50
    assert calls[-1] == (50, 50)
    assert evaluate(model, batches).top1 == evaluate(model, test).top1 == evaluate(model, test, limit=10_000).top1


def test_limit_of_an_image_set_is_a_mixture_of_classes():
    test = load_data("digits").test
    assert test is not None
    labels = [y for _, y in test.batches(limit=60, seed=0)]
    assert labels[0] is not None
    assert len(labels[0].unique()) == 10


def test_modes_come_back_even_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Sequential(nn.ReLU()))
    model.train()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    seen = []

    def fail() -> None:
        with eval_mode(model):
            seen.extend(m.training for m in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(seen)
    assert [m.training for m in model.modules()] == flags == [True, True, False, True, True]
    with pytest.raises(ConvpareError, match="the model failed"):
        evaluate(model, [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))])
    assert [m.training for m in model.modules()] == flags


def test_batch_norm_is_not_changed():
    model = load_model("convpare:digits").module.train()
    before = model.stem[1].running_mean.clone()
    evaluate(model, load_data("digits").test, limit=20)
    assert torch.equal(model.stem[1].running_mean, before)
    assert model.training


def test_images_take_the_models_type():
    model = load_model("convpare:digits").module
    test = load_data("digits").test
    assert evaluate(model.double(), test, limit=40).top1 == evaluate(model.float(), test, limit=40).top1


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([[0.0, 1.0]], [2], r"go from 2 to 2, but the model has 2 outputs, for classes 0 to 1"),
        ([[0.0, 1.0]], [-1], r"go from -1 to -1"),
        ([[0.0, math.nan]], [0], "NaN or infinity"),
        ([[0.0, math.inf]], [0], "NaN or infinity"),
        ([[0.0, 1.0]], [0, 1], r"labels of shape \(2,\)"),
        ([[0.0, 1.0]], [0.5], "whole number"),
        ([[0.0, 1.0]], None, "have none"),
    ],
)
def test_bad_batches(rows, labels, message):
    y = None if labels is None else torch.tensor(labels)
    with pytest.raises(ConvpareError, match=message):
        evaluate(Flat(), [(outputs(rows), y)])


def test_no_images_bad_limit_and_no_classifier():
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ConvpareError, match="no images"):
        evaluate(Flat(), [])
    with pytest.raises(ConvpareError, match="limit is 0"):
        evaluate(Flat(), [(x, y)], limit=0)
    with pytest.raises(ConvpareError, match=r"gave \(2, 3, 4, 4\) for 2 images"):
        evaluate(nn.Identity(), [(x, y)])


@pytest.mark.real
def test_mobilenet_on_imagenet500(shared: Path, tmp_path: Path):
    pytest.importorskip("timm")
    (tmp_path / "train").symlink_to(shared / "data/imagenet-calib", target_is_directory=True)
    (tmp_path / "val").symlink_to(shared / "data/imagenet500", target_is_directory=True)
    source = load_model("convpare:mobilenet_v1_025", weights=shared / "weights/mobilenet_v1_025-imagenet.safetensors")
    data = load_data(str(tmp_path), default=source.preprocessing)
    assert data.test is not None
    assert (len(data.train), len(data.test), data.num_classes, data.test.shape) == (600, 500, 1000, (3, 224, 224))
    assert sorted(set(data.test.labels.tolist())) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    result = evaluate(source.module, data.test)
    assert (result.top1, result.top5) == (pytest.approx(52.0), pytest.approx(78.4))
