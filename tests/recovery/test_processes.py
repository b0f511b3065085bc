"""Several processes on this machine, over gloo: they learn what one learns, and end together."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convpare
from convpare.artifact import load_artifact
from convpare.cli import main
from convpare.cli.together import together
from convpare.compress import CompressOptions, compress
from convpare.data import load_data
from convpare.errors import ConvpareError
from convpare.modes import one_thread
from convpare.recovery import RecoverOptions, TuneOptions, processes, training
from convpare.recovery.processes import OfOneProcess, Processes, current, several
from convpare.recovery.training import TrainOptions, augmented, train_
from convpare.recovery.tuning import USUAL, tune

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
UNEVEN = TrainOptions(
    epochs=3, batch_size=16, lr=0.05, crop=1, flip=True, norms="frozen", clip=0.5, ema=0.9, schedule="cosine"
)
TOLERANCES = {torch.float64: (1e-12, 1e-14), torch.float32: (1e-4, 1e-5)}  # relative, absolute
CLOSE = {"rtol": TOLERANCES[torch.float32][0], "atol": TOLERANCES[torch.float32][1]}


class Odd(nn.Module):
    """Tied weights, a layer that nothing uses and one that only some images reach."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.a, self.b, self.unused = nn.Linear(512, 32), nn.Linear(32, 512, bias=False), nn.Linear(3, 3)
        self.b.weight = nn.Parameter(self.a.weight.detach().t().clone())
        self.c, self.seldom, self.head = nn.Linear(512, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.stem(x)).relu() + self.c(self.stem(x))
        few = x[:, 0, 6, 7] > 0  # seven in a hundred digits
        if bool(few.any()):  # perhaps in one process alone
            y = y + few[:, None] * self.seldom(y)
        return self.head(y)


def odd(seed: int) -> Odd:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Odd()


def digits(count: int) -> tuple[Tensor, Tensor]:
    train = load_data("digits").train
    assert train.labels is not None
    return train.tensor(count), train.labels[:count]


def trained(dtype: torch.dtype, seed: int) -> tuple[dict[str, Tensor], list[Any]]:
    """What is learnt of 101 images in batches of 14 and 15; where there are several processes only one has the seed."""
    model = odd(seed).to(dtype)
    images, labels = digits(101)
    history = train_(model, images.to(dtype), labels, UNEVEN)
    return model.state_dict(), [[epoch.number, epoch.loss, epoch.top1] for epoch in history]


def narrow(seed: int) -> tuple[nn.Module, nn.Module]:
    """A network and one with fewer channels, both of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = convpare.load_model("convpare:digits").module
    plan = convpare.plan(teacher, torch.zeros(1, 1, 8, 8), macs=0.3, criterion="l2")
    return convpare.apply(teacher, plan), teacher


def distilled(seed: int) -> tuple[dict[str, Tensor], float]:
    small, teacher = narrow(seed)
    options = TuneOptions(training=replace(USUAL, epochs=2, batch_size=33), images=150)
    done = tune(small, teacher, load_data("digits"), options=options)
    return done.model.state_dict(), done.errors[1]


def compressed(seed: int) -> tuple[dict[str, Tensor], list[str]]:
    _, teacher = narrow(seed)
    recover = RecoverOptions("distill", images=64, tune=TuneOptions(epochs=1, images=100))
    options = CompressOptions(recover=recover, test_limit=20)
    done = compress(
        teacher, torch.zeros(1, 1, 8, 8), load_data("digits"), macs=0.4, criterion="l2", options=options
    )  # fmt: skip
    return done.model.state_dict(), [stage.name for stage in done.stages]


JOB = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_processes
test_processes.job()
"""


def job() -> None:
    """What each of two processes does; what it found goes to the folder that is named on the command line."""
    folder, us = Path(sys.argv[1]), current()
    mine = us.rank  # as a seed: what the main process has must hold
    found: dict[str, Any] = {"device": str(us.device), "count": us.count}
    tensors: dict[str, Tensor] = {}

    def keep(name: str, state: dict[str, Tensor], more: object) -> None:
        tensors.update({f"{name}.{key}": value.clone().contiguous() for key, value in state.items()})
        found[name] = more

    keep("float64", *trained(torch.float64, mine))
    keep("float32", *trained(torch.float32, mine))
    keep("distilled", *distilled(mine))
    keep("compressed", *compressed(mine))

    norm = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).double()
    images, labels = digits(5)
    train_(norm, images.double(), labels, TrainOptions(epochs=1, batch_size=5, lr=1e-12, momentum=0.5))
    keep("norm", norm.state_dict(), None)

    small, teacher = narrow(mine)
    timed = tune(small, teacher, digits(200)[0], options=TuneOptions(minutes=0.001, batch_size=30))
    keep("timed", timed.model.state_dict(), [len(timed.history), timed.images])

    def failing() -> None:
        raise ConvpareError(f"no good in {us.rank}")

    for name, call in (
        ("small", lambda: train_(odd(0), *digits(4), replace(UNEVEN, batch_size=1))),
        ("failing", lambda: us.once(failing)),
        ("first", lambda: main_alone(us)),
    ):
        try:
            call()
        except ConvpareError as error:
            found[name] = [type(error).__name__, str(error)]
    save_file(tensors, folder / f"{us.rank}.safetensors")
    (folder / f"{us.rank}.json").write_text(json.dumps(found))
    processes.leave()


def main_alone(us: Processes) -> None:
    """The main process fails, and the others do not come to it."""
    with us.main_first():
        if not us.main:
            raise AssertionError("the main process was to fail first")
        raise ConvpareError("no such folder")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def launched(launcher: Sequence[str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """What the two processes of `job` found."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "job.py").write_text(JOB)
    run = launched(TORCHRUN, str(folder / "job.py"), str(folder))
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in (0, 1)
    ]


def part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


# ------------------------------------------------------------------------------------------------ two learn as one does


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_processes_learn_what_one_does(both: Any, dtype: torch.dtype):
    """Shares of 7 and 8 images, cropped and mirrored; clipped gradients; averaged weights; layers out of use."""
    name = str(dtype).removeprefix("torch.")
    with one_thread():
        state, history = trained(dtype, 0)
    relative, absolute = TOLERANCES[dtype]
    for tensors, found in both:
        torch.testing.assert_close(part(tensors, name), state, rtol=relative, atol=absolute)
        assert [x[0] for x in found[name]] == [1, 2, 3]
        assert [x[1] for x in found[name]] == pytest.approx([x[1] for x in history], rel=1e-5)
        assert [x[2] for x in found[name]] == [x[2] for x in history]
    start = odd(0).to(dtype).state_dict()
    assert torch.equal(state["unused.weight"], start["unused.weight"])
    assert not torch.equal(state["seldom.weight"], start["seldom.weight"])


def test_all_processes_end_with_the_same_bits(both: Any):
    (first, one), (second, other) = both
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    assert (one["count"], one["device"]) == (2, "cpu") or torch.cuda.is_available()
    assert one["timed"] == other["timed"]


def test_distilling_by_two_processes(both: Any):
    with one_thread():
        state, error = distilled(0)
    for tensors, found in both:
        torch.testing.assert_close(part(tensors, "distilled"), state, **CLOSE)
        assert found["distilled"] == pytest.approx(error, rel=1e-3)


def test_compressing_by_two_processes(both: Any):
    """The main one plans and calibrates; all train, and have the result."""
    with one_thread():
        state, stages = compressed(0)
    for tensors, found in both:
        torch.testing.assert_close(part(tensors, "compressed"), state, **CLOSE)
        assert found["compressed"] == stages


def test_running_statistics_are_the_mean_of_those_of_the_shares(both: Any):
    """Five images: two in one process, three in the other, which count so much."""
    images, _ = digits(5)
    order = torch.randperm(5, generator=epoch_generator(5))
    shares = images.double()[order].split([2, 3])
    tensors, _ = both[0]
    mean, variance = (sum(len(x) / 5 * f(x) for x in shares) for f in (torch.mean, torch.var))
    got = part(tensors, "norm")
    torch.testing.assert_close(got["0.running_mean"], 0.1 * mean[None])
    torch.testing.assert_close(got["0.running_var"], 0.9 + 0.1 * variance[None])


def epoch_generator(count: int) -> torch.Generator:
    """That of the images in the first epoch, as a run in one process has it."""
    run = training._Run(nn.Linear(1, 2), torch.zeros(count, 1), torch.zeros(count).long(), TrainOptions(), None, Processes())  # fmt: skip # noqa: E501
    with torch.random.fork_rng(devices=[]):
        run._seed(1)
    return run.generator


def test_errors_reach_all_processes(both: Any):
    for _, found in both:
        assert found["small"] == ["ConvpareError", found["small"][1]]
        assert "2 processes cannot share batches of 1" in found["small"][1]
        assert found["failing"] == ["ConvpareError", "no good in 0"]
        assert found["first"] == ["ConvpareError", "no such folder"]


# ------------------------------------------------------------------------------------------------ one of them


def test_shares_are_whole():
    for batch in (2, 7, 128):
        for count in (1, 2, 3, 5):
            parts = [list(range(batch))[Processes(rank, count).share(batch)] for rank in range(count)]
            assert [x for p in parts for x in p] == list(range(batch))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_share_is_cropped_and_mirrored_as_in_the_whole():
    images, options = torch.randn(9, 2, 5, 6), TrainOptions(crop=2, flip=True)
    whole = augmented(images, options, torch.Generator().manual_seed(1))
    share = slice(4, 9)
    mine = augmented(images[share], options, torch.Generator().manual_seed(1), 9, share)
    assert torch.equal(mine, whole[share])


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch):
    """No accelerate is imported; where a launch is detected, it is asked for."""
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert not several()
    assert current() == Processes(0, 1, None)
    assert train_(odd(0), *digits(20), UNEVEN)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert several()
    with pytest.raises(ConvpareError, match=r"pip install convpare\[train\]"):
        train_(odd(0), *digits(20), UNEVEN)


def test_a_process_with_other_images_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "current", lambda: Processes(1, 2))
    about = {"options": {}, "images": [40, 1, 8, 8], "labels": True, "shapes": {}}
    monkeypatch.setattr(Processes, "once", lambda *_: ({}, about))
    with pytest.raises(
        OfOneProcess, match=r"process 2 of 2: its options and objective and images and shapes are not the main"
    ):
        train_(odd(0), *digits(20), UNEVEN)


# ------------------------------------------------------------------------------------------------ the command

DYING = """
import os, signal, sys
from convpare.cli import main
from convpare.recovery import training
training.SAVED_EVERY = 0.0
step, steps = training._Run._step, []
def dying(run, progress):
    steps.append(progress)
    if os.environ["RANK"] == "1" and len(steps) == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    step(run, progress)
training._Run._step = dying
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network's weights, an artifact made of it, and what one process makes of that."""
    folder = tmp_path_factory.mktemp("place")
    small, teacher = narrow(0)
    save_file(teacher.state_dict(), folder / "w.safetensors")
    convpare.save(small, folder / "small", plan=small._convpare_plan, spec="convpare:digits")  # type: ignore[arg-type]
    (folder / "dying.py").write_text(DYING)
    with pytest.MonkeyPatch.context() as patched, one_thread():
        patched.chdir(folder)
        command(*THREE, "-o", "whole")
    return folder


RECOVER = (
    "recover small --teacher convpare:digits --weights w.safetensors --data digits --train-images 170 "
    "--batch-size 40 --recover-images 32 --limit 30"
).split()
THREE = (*RECOVER, "--epochs", "3")


def command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code


def weights(artifact: str) -> dict[str, Tensor]:
    return load_artifact(artifact).module.state_dict()


def test_a_killed_process_ends_the_job_which_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch):
    """In the second epoch; then by one process, and by two that `accelerate launch` starts."""
    monkeypatch.chdir(place)
    run = launched(TORCHRUN, "dying.py", "6", *THREE, "-o", "two")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "error: a process of 2 was lost" in err
    assert "training goes on from the state that was stored last" in err
    assert (out, Path("two").exists(), Path("two.training.new").exists()) == ("", False, False)
    shutil.copy("two.training", "one.training")
    _, about = training.read_checkpoint(Path("two.training"))
    assert (len(about["history"]), about["step"]) in ((1, 1), (1, 2))  # by what reached the main process first
    with one_thread():
        command(*THREE, "-o", "one")
    again = launched(ACCELERATE, "-m", "convpare.cli", *THREE, "-o", "two", "--json", "two.json")
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert out.count("saved to two") == 1
    for name in ("one", "two"):
        torch.testing.assert_close(weights(name), weights("whole"), **CLOSE)
        assert not Path(f"{name}.training").exists()
    found = json.loads(Path("two.json").read_text())
    assert [epoch["number"] for epoch in found["recovery"]["training"]["epochs"]] == [1, 2, 3]
    assert found["recovery"]["gradient_passes"] == 3 * 153


def test_interrupted(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    run = launched(TORCHRUN, "dying.py", "0", *RECOVER, "--epochs", "1000", "-o", "halted")
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not Path("halted.training").exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.02)
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=40)
    assert run.returncode in (1, 130)
    assert err.count("error: interrupted; nothing is half-written") == 1
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert not Path("halted").exists()
    assert [x.name for x in Path().glob("halted*")] == ["halted.training"]
    assert training.read_checkpoint(Path("halted.training"))[1]["options"]["epochs"] == 1000


def test_what_several_processes_do_not_share(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        main(["inspect", "convpare:digits"])
    assert "only the training of compress, apply, recover is shared" in capsys.readouterr().err


def test_told_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """By SIGTERM, which a launcher sends when another process is gone: no `except` on the way takes it for an error."""
    module = importlib.import_module("convpare.cli.together")
    monkeypatch.setattr(module, "several", lambda: True)
    monkeypatch.setattr(module, "current", lambda: Processes(0, 2))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end, together(["recover"]), contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 1
    assert "error: a process of 2 was lost: process 1 noticed by SIGTERM" in capsys.readouterr().err
