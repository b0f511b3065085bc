import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convpare.data import load_data
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.modes import one_thread
from convpare.recovery import training
from convpare.recovery.training import EpochRecord, TrainOptions, augmented, train_

SMALL = TrainOptions(epochs=4, batch_size=16, lr=0.05, crop=1, flip=True)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
            nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


def digits(count: int) -> tuple[Tensor, Tensor]:
    train = load_data("digits").train
    assert train.labels is not None
    return train.tensor(count), train.labels[:count]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    other = b.state_dict()
    return [name for name, value in a.state_dict().items() if not torch.equal(value, other[name])]


def stop_after(number: int):
    def on_progress(record: EpochRecord) -> None:
        if record.number == number:
            raise KeyboardInterrupt

    return on_progress


# ---------------------------------------------------------------- what is learnt


def test_it_learns_the_digits():
    data = load_data("digits")
    model = net()
    options = TrainOptions(epochs=12, batch_size=32, lr=0.1, crop=1)
    history = train_(model, data.train.tensor(), data.train.labels, options)
    assert [epoch.number for epoch in history] == list(range(1, 13))
    assert history[-1].loss < 0.5 < history[0].loss
    assert history[-1].top1 > 85
    assert all(epoch.seconds > 0 for epoch in history)
    assert evaluate(model, data.test).top1 > 94


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_steps_are_those_of_sgd_written_out(schedule):
    """v <- m v + g + d w; w <- w - lr (g + d w + m v), with d = 0 for biases."""
    options = TrainOptions(epochs=3, batch_size=4, lr=0.2, momentum=0.8, weight_decay=0.1, schedule=schedule)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    model = nn.Linear(3, 3).double()
    values = [p.detach().clone() for p in model.parameters()]
    speeds = [torch.zeros_like(v) for v in values]
    losses = []
    for step in range(3):
        progress = (step + 0.5) / 3
        rate = options.learning_rate(progress)
        weights = [v.clone().requires_grad_() for v in values]
        loss = F.cross_entropy(F.linear(x, *weights), y)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        for value, speed, gradient, decay in zip(values, speeds, gradients, (0.1, 0.0), strict=True):
            gradient = gradient + decay * value  # noqa: PLW2901
            speed.mul_(0.8).add_(gradient)
            value.sub_(rate * (gradient + 0.8 * speed))
    history = train_(model, x, y, options)
    torch.testing.assert_close([epoch.loss for epoch in history], losses)
    torch.testing.assert_close([p.detach() for p in model.parameters()], values)


def test_scales_and_biases_do_not_decay():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    still = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))  # its loss does not depend on the first network's parameters
    both = nn.ModuleDict({"idle": model, "used": still})
    both.forward = lambda x: both["used"](x) + 0 * both["idle"](x)  # type: ignore[method-assign]
    before = {name: p.detach().clone() for name, p in both.named_parameters()}
    train_(both, torch.randn(8, 1, 2, 2), torch.randint(0, 2, (8,)), TrainOptions(epochs=2, weight_decay=0.1))
    idle = {name: p for name, p in both.named_parameters() if name.startswith("idle")}
    assert {name for name, p in idle.items() if not torch.equal(p, before[name])} == {"idle.0.weight", "idle.3.weight"}
    assert all(p.norm() < before[name].norm() for name, p in idle.items() if p.ndim > 1)


def test_learning_rates():
    one_cycle, cosine = TrainOptions(lr=0.7), TrainOptions(lr=0.7, schedule="cosine")
    assert [one_cycle.learning_rate(p) for p in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx([0, 0.35, 0.7, 0.35, 0])
    assert [cosine.learning_rate(p) for p in (0, 1 / 3, 0.5, 1)] == pytest.approx([0.7, 0.525, 0.35, 0])


def test_batches_are_of_about_one_size():
    sizes = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    train_(model, torch.randn(33, 1, 2, 2), torch.randint(0, 2, (33,)), TrainOptions(epochs=1, batch_size=16))
    assert sizes == [11, 11, 11]


def test_every_image_is_seen_once_an_epoch():
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].flatten()))
    images = torch.arange(10.0)[:, None]
    train_(model, images, torch.zeros(10, dtype=torch.int64), TrainOptions(epochs=2, batch_size=5, lr=1e-3))
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert torch.equal(first.sort().values, images[:, 0])
    assert torch.equal(second.sort().values, images[:, 0])
    assert not torch.equal(first, second)


def test_videos_and_bf16():
    torch.manual_seed(0)
    images, labels = torch.randn(32, 1, 4, 6, 6), torch.arange(32) % 2
    images[labels == 1] += 1
    model = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    dtypes = []
    model[0].register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
    history = train_(model, images, labels, TrainOptions(epochs=10, batch_size=8, bf16=True, crop=1))
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history[-1].top1 > 95


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_crops_and_flips_by_hand(padding):
    images = torch.arange(40 * 2 * 4 * 5, dtype=torch.float32).reshape(40, 2, 4, 5) + 1
    options = TrainOptions(crop=2, flip=True, padding=padding)
    out = augmented(images, options, torch.Generator().manual_seed(3))
    assert out.shape == images.shape
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect" if padding == "reflect" else "constant")
    found = set()
    for image, wide in zip(out, padded, strict=True):
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, wide[:, top : top + 4, left : left + 5])
        ]
        assert matches
        found.update(matches)
    assert len(found) > 20  # drawn for each image by itself


def test_frames_of_a_video_move_together():
    frame = torch.randn(6, 1, 1, 5, 5)
    out = augmented(frame.expand(6, 2, 3, 5, 5), TrainOptions(crop=1, flip=True), torch.Generator().manual_seed(0))
    assert out.shape == (6, 2, 3, 5, 5)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))


def test_without_augmentation_images_stay():
    images = torch.randn(3, 1, 2, 2)
    assert augmented(images, TrainOptions(), torch.Generator()) is images


# ---------------------------------------------------------------- what is left alone


def test_modes_gradients_and_generators_are_left_as_they_were():
    model = net().eval()
    model[1].train()
    model[0].weight.grad = gradient = torch.ones_like(model[0].weight)
    before = torch.get_rng_state()
    images, labels = digits(64)
    kept = images.clone()
    train_(model, images, labels, SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model] == [False, True, *[False] * 6]
    assert model[0].weight.grad is gradient and bool((gradient == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert torch.equal(images, kept)


def test_frozen_parameters_stay():
    model = net()
    model[0].weight.requires_grad_(False)
    before = net()
    train_(model, *digits(64), SMALL)
    assert "0.weight" not in differing(model, before)
    assert "4.weight" in differing(model, before)


def test_training_repeats():
    first, second, other = net(), net(), net()
    images, labels = digits(64)
    train_(first, images, labels, SMALL)
    torch.rand(5)
    train_(second, images, labels, SMALL)
    train_(other, images, labels, replace(SMALL, seed=1))
    assert same(first, second)
    assert not same(first, other)


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, stop: int):
    images, labels = digits(100)
    whole, first, second = net(), net(), net(seed=9)
    expected = train_(whole, images, labels, SMALL)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_(first, images, labels, SMALL, checkpoint=path, on_progress=stop_after(stop))
    assert not same(whole, first)
    numbers = []
    history = train_(second, images, labels, SMALL, checkpoint=path, on_progress=lambda r: numbers.append(r.number))
    assert same(whole, second)
    assert numbers == list(range(stop + 1, 5))
    assert [(r.number, r.loss, r.top1) for r in history] == [(r.number, r.loss, r.top1) for r in expected]
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_finished_training_is_only_read(tmp_path: Path):
    images, labels = digits(40)
    first, second = net(), net(seed=9)
    path = tmp_path / "state"
    history = train_(first, images, labels, SMALL, checkpoint=path)
    written = path.read_bytes()
    assert train_(second, images, labels, SMALL, checkpoint=path) == history
    assert same(first, second)
    assert path.read_bytes() == written


def test_a_checkpoint_is_plain_tensors_and_json(tmp_path: Path):
    path = tmp_path / "state"
    model = net()
    train_(model, *digits(40), SMALL, checkpoint=path)
    with safe_open(path, framework="pt") as file:
        names, about = set(file.keys()), json.loads(file.metadata()["about"])
    assert names == {f"model.{n}" for n in model.state_dict()} | {f"momentum.{n}" for n, _ in model.named_parameters()}
    assert about["options"]["lr"] == 0.05
    assert [record["number"] for record in about["history"]] == [1, 2, 3, 4]


def test_tied_and_unused_parameters_are_stored(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False), nn.Linear(2, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.flatten(1)).relu())

    images, labels = digits(40)
    whole, first, second = Tied(), Tied(), Tied()
    first.load_state_dict(whole.state_dict())
    second.unused.load_state_dict(whole.unused.state_dict())
    options = replace(SMALL, crop=0, flip=False)
    train_(whole, images, labels, options)
    with pytest.raises(KeyboardInterrupt):
        train_(first, images, labels, options, checkpoint=tmp_path / "s", on_progress=stop_after(2))
    train_(second, images, labels, options, checkpoint=tmp_path / "s")
    assert same(whole, second)
    assert second.b.weight is second.a.weight


@pytest.mark.parametrize("what", ["options", "images", "shapes"])
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, what: str):
    images, labels = digits(40)
    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        train_(net(), images, labels, SMALL, checkpoint=path, on_progress=stop_after(1))
    model, options, count = net(), SMALL, 40
    if what == "options":
        options = replace(SMALL, epochs=5)
    if what == "images":
        count = 39
    if what == "shapes":
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ConvpareError, match=f"with other {what}"):
        train_(model, images[:count], labels[:count], options, checkpoint=path)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path):
    images, labels = digits(40)
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(ConvpareError, match="damaged"):
        train_(net(), images, labels, SMALL, checkpoint=tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ConvpareError, match="no checkpoint of a training"):
        train_(net(), images, labels, SMALL, checkpoint=tmp_path / "weights")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum 1.0"),
        ({"momentum": 0.0}, "momentum 0.0"),
        ({"weight_decay": -1.0}, "weight_decay -1.0"),
        ({"crop": -1}, "crop -1"),
        ({"seed": -1}, "seed -1"),
        ({"schedule": "step"}, "choose one of one-cycle, cosine"),
        ({"padding": "circular"}, "choose one of zeros, reflect"),
        ({"norms": "none"}, "choose one of batch, frozen"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"clip": -1.0}, "clip -1.0"),
    ],
)
def test_options_that_are_refused(change, message):
    with pytest.raises(ConvpareError, match=message):
        replace(TrainOptions(), **change)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64), "give preprocessed floating-point images"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "torch.uint8"),
        (torch.zeros(4, 1, 8, 8), torch.zeros(3, dtype=torch.int64), "one whole number per image"),
        (torch.zeros(4, 1, 8, 8), torch.zeros(4), "one whole number per image"),
        (torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, -1, 2]), "from 0"),
        (torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 10, 2]), "labels go up to 10, but the model has outputs for 10"),
        (torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64), "crops and flips need"),
        (torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.int64), "loss is nan in epoch 1.*Lower lr"),
    ],
)
def test_images_and_labels_that_are_refused(images, labels, message):
    with pytest.raises(ConvpareError, match=message):
        train_(net(), images, labels, SMALL)


def test_padding_wider_than_the_image_is_refused():
    with pytest.raises(ConvpareError, match="cannot be padded by reflecting 8"):
        train_(net(), *digits(8), replace(SMALL, crop=8, padding="reflect"))


def test_models_that_are_refused():
    images, labels = digits(8)
    with pytest.raises(ConvpareError, match="needs \\(images, classes\\) outputs"):
        train_(nn.Conv2d(1, 2, 1), images, labels, SMALL)
    with pytest.raises(ConvpareError, match="nothing to train"):
        train_(nn.Flatten(), images, labels, SMALL)


def test_divergence_is_an_error_that_leaves_the_last_checkpoint(tmp_path: Path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    modes = [m.training for m in model.eval().modules()]
    path = tmp_path / "state"
    with pytest.raises(ConvpareError, match=r"Lower lr, such as to 3\.3e"):
        train_(model, *digits(64), TrainOptions(epochs=50, batch_size=8, lr=1e4), checkpoint=path)
    assert [m.training for m in model.modules()] == modes
    if path.exists():
        with safe_open(path, framework="pt") as file:
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


# ---------------------------------------------------------------- within an epoch


@pytest.mark.parametrize("steps", [2, 9, 14])
def test_a_training_stopped_within_an_epoch_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
):
    monkeypatch.setattr(training, "SAVED_EVERY", 0.0)
    images, labels = digits(100)
    options = replace(SMALL, ema=0.9, epochs=3)
    whole, first, second = net(), net(), net(seed=9)
    expected = train_(whole, images, labels, options)

    def stop(done: int, total: int) -> None:
        assert total == 21
        if done == steps:
            raise KeyboardInterrupt

    path, seen = tmp_path / "state", []
    with pytest.raises(KeyboardInterrupt):
        train_(first, images, labels, options, checkpoint=path, on_step=stop)
    state = torch.get_rng_state()
    history = train_(second, images, labels, options, checkpoint=path, on_step=lambda done, _: seen.append(done))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(whole, second)
    assert seen == list(range(steps + 1, 22))
    assert [(r.number, r.loss, r.top1) for r in history] == [(r.number, r.loss, r.top1) for r in expected]


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training as t
t.training.SAVED_EVERY = 0.0
images, labels = t.digits(100)
model = t.net(seed=int(sys.argv[1]))
t.train_(model, images, labels, t.SMALL, checkpoint=Path({path!r}), on_step=lambda done, _: print(done, flush=True))
t.save_file(model.state_dict(), {out!r})
"""


def test_a_killed_process_goes_on_with_the_same_bits(tmp_path: Path):
    path, out = tmp_path / "state", tmp_path / "out.safetensors"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path), out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code, "0"], stdout=subprocess.PIPE, env=environment, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) >= 11:
                run.send_signal(signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    subprocess.run([sys.executable, "-c", code, "9"], check=True, stdout=subprocess.DEVNULL, env=environment)
    whole = net()
    with one_thread():
        train_(whole, *digits(100), SMALL)
    ended = load_file(out)
    assert all(torch.equal(value, ended[name]) for name, value in whole.state_dict().items())


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path: Path):
    images, labels = digits(40)
    path = tmp_path / "state"
    train_(net(), images, labels, SMALL, checkpoint=path)
    with safe_open(path, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for spoiled, kept in (({"step": 3}, tensors), ({"history": [{}]}, tensors), ({}, {"a": torch.zeros(1)})):
        text = json.dumps({**json.loads(about["about"]), **spoiled})
        save_file(kept, path, {**about, "about": text})
        with pytest.raises(ConvpareError, match="is damaged"):
            train_(net(), images, labels, replace(SMALL), checkpoint=path)


# ---------------------------------------------------------------- averages, clipping, norms, memory


def test_the_average_of_the_weights_by_hand():
    images, labels = digits(64)
    seen: list[dict[str, Tensor]] = []
    model = net()
    options = replace(SMALL, ema=0.8, epochs=2)
    train_(model, images, labels, options, on_step=lambda *_: seen.append(copy.deepcopy(model.state_dict())))
    average = {name: value.clone() for name, value in seen[0].items()}
    for step, state in enumerate(seen):
        kept = min(0.8, (1 + step) / (10 + step))
        for name, value in state.items():
            average[name] = kept * average[name] + (1 - kept) * value if value.is_floating_point() else value
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(model[0].weight, seen[-1]["0.weight"])


def test_gradients_are_clipped():
    torch.manual_seed(0)
    free, clipped = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    clipped.load_state_dict(free.state_dict())
    start = free[1].weight.detach().clone()
    options = TrainOptions(epochs=1, batch_size=64, lr=1.0, weight_decay=0, momentum=0.5)
    for model, clip in ((free, 0.0), (clipped, 0.01)):
        train_(model, *digits(64), replace(options, clip=clip))
    moved = [(model[1].weight.detach() - start).flatten() for model in (free, clipped)]
    assert moved[1].norm() < 0.1 * moved[0].norm()
    cosine = F.cosine_similarity(moved[0], moved[1], 0)
    assert float(cosine) == pytest.approx(1, abs=1e-5)


def test_frozen_norms_keep_their_statistics():
    images, labels = digits(64)
    model, before = net(), net()
    train_(model, images, labels, replace(SMALL, norms="frozen"))
    assert "1.running_mean" not in differing(model, before)
    assert {"1.weight", "1.bias", "0.weight"} <= set(differing(model, before))
    assert model[1].training


def test_the_memory_format_is_given_back():
    model = net()
    before = {name: p.stride() for name, p in model.named_parameters()}
    seen = []
    handle = model[0].register_forward_hook(lambda m, *_: seen.append(m.weight.stride()))
    train_(model, *digits(16), replace(SMALL, epochs=1))
    handle.remove()
    assert {name: p.stride() for name, p in model.named_parameters()} == before
    assert seen[0] == (9, 1, 3, 1)


def test_labels_that_are_missing():
    with pytest.raises(ConvpareError, match="training on labels needs some"):
        train_(net(), digits(8)[0], None, SMALL)
