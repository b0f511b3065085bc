import copy
import errno
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import convpare
from convpare import artifact
from convpare.apply import plan_of
from convpare.artifact import is_artifact, load, load_artifact, read_record, save
from convpare.blocks import ZeroPadShortcut, mobilenet_v1_025, resnet20
from convpare.blocks.cifar import CifarResNet
from convpare.blocks.digits import digits_net
from convpare.data.preprocessing import Preprocessing
from convpare.errors import ConvpareError
from convpare.graph import mends, removed, trace
from convpare.graph.mending import numbers, set_numbers
from convpare.planning.cost import Cost
from convpare.planning.plan import Plan, RemoveChannels
from convpare.planning.settings import PlanOptions
from convpare.zoo import load_model

torch.set_num_threads(1)

PLAN = Plan(
    "CifarResNet", ((1, 3, 32, 32),), "l2", {"seed": 3}, {"macs": 0.5}, Cost(100, 10, 5), Cost(50, 6, 3),
    (RemoveChannels("conv1", (0, 2, 5), 16, 0.25),),
)  # fmt: skip


def pruned(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    graph = trace(model, x)
    keep = np.random.default_rng(seed).random(graph.channels) < 0.6
    keep[[group.start for group in graph.groups]] = True
    assert not keep.all()
    return removed(model, graph, keep).eval()


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics that matter in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2, generator=generator)
    return model.eval()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def bits(tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().resolve_conj().contiguous().flatten()
    return tensor.shape, tensor.dtype, flat.view(torch.uint8).numpy().tobytes()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert list(ours) == list(theirs)
    for name in ours:
        assert bits(ours[name]) == bits(theirs[name]), name
    modules = dict(b.named_modules(remove_duplicate=False))
    for name, module in a.named_modules(remove_duplicate=False):
        assert numbers(module) == numbers(modules[name]), name


def small() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(1)


@pytest.fixture(scope="module")
def small_pruned() -> nn.Module:
    return pruned(scrambled(small()), torch.zeros(1, 3, 32, 32))


@pytest.fixture
def saved(tmp_path: Path, small_pruned: nn.Module) -> Path:
    preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3, 40, 32)
    return save(small_pruned, tmp_path / "net", plan=PLAN, preprocessing=preprocessing, figures={"top1": 91.25})


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Write a record as a forger would: with the right checksums of whatever it now says."""
    record["checksum"] = artifact._checksum(record)
    (folder / "plan.json").write_text(json.dumps(record))


def seal_weights(folder: Path, weights: bytes) -> None:
    record = json.loads((folder / "plan.json").read_text())
    (folder / "model.safetensors").write_bytes(weights)
    record.update(size=len(weights), sha256=hashlib.sha256(weights).hexdigest())
    seal(folder, record)


# ---------------------------------------------------------------------------------------------------------- round trip


def test_pruned_builtin_round_trip(tmp_path):
    x = torch.randn(4, 3, 32, 32)
    model = pruned(scrambled(resnet20()), x)
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    figures = {"accuracy": {"before": 92.5, "after": [91.0, None, True]}, "note": "Bäume ☃"}
    folder = save(
        model, tmp_path / "deep" / "net", plan=PLAN, spec="convpare:resnet20",
        preprocessing=preprocessing, figures=figures,
    )  # fmt: skip
    assert folder == (tmp_path / "deep" / "net").resolve()
    assert sorted(os.listdir(folder)) == ["model.safetensors", "plan.json"]
    assert os.listdir(folder.parent) == ["net"]
    back = load_artifact(folder)
    assert (back.plan, back.spec, back.preprocessing) == (PLAN, "convpare:resnet20", preprocessing)
    assert back.figures == figures
    assert not back.module.training
    assert_same(back.module, model)
    assert torch.equal(back.module(x), model(x))
    assert_same(load(folder, resnet20), model)


def test_what_it_was_made_from(tmp_path, small_pruned, saved):
    assert "origin" not in json.loads((saved / "plan.json").read_text())
    assert load_artifact(saved, small).origin == read_record(saved).origin == {}
    origin = {"commands": ["a b"], "network": {"layers": [1, None]}}
    folder = save(small_pruned, tmp_path / "made", plan=PLAN, origin=origin)
    assert load_artifact(folder, small).origin == origin
    record = read_record(folder)
    assert (record.origin, record.plan, record.version) == (origin, PLAN, convpare.__version__)
    edit(folder, "origin", to=[])
    with pytest.raises(ConvpareError, match="'origin' must be dict"):
        read_record(folder)
    with pytest.raises(ConvpareError, match="plain JSON values"):
        save(small_pruned, tmp_path / "made", origin={"x": float("nan")})


def test_a_record_is_read_without_its_weights(saved):
    (saved / "model.safetensors").write_bytes(b"")
    assert read_record(saved).plan == PLAN
    (saved / "model.safetensors").unlink()
    assert read_record(saved).figures == {"top1": 91.25}
    with pytest.raises(ConvpareError, match="no file"):
        read_record(saved.parent)


def test_the_model_and_its_mode_are_left_alone(tmp_path, small_pruned):
    model = copy.deepcopy(small_pruned).train()
    save(model, tmp_path / "net")
    assert all(module.training for module in model.modules())
    assert_same(model, small_pruned)


def test_a_loaded_model_can_be_trained(saved):
    model = load(saved, small).train()
    before = copy.deepcopy(model)
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model.conv1.weight, before.conv1.weight)
    assert not torch.equal(model.bn1.running_mean, before.bn1.running_mean)


def test_the_weights_are_a_plain_safetensors_file(saved, small_pruned):
    state = load_file(saved / "model.safetensors")
    assert state.keys() == small_pruned.state_dict().keys()
    small_again = load(saved, small)
    small_again.load_state_dict(state)


def test_what_is_not_given_is_none(tmp_path, small_pruned):
    back = load_artifact(save(small_pruned, tmp_path / "net"), small)
    assert (back.plan, back.spec, back.preprocessing, back.figures) == (None, None, None, {})


def test_the_plan_that_apply_left_is_saved(tmp_path):
    """A network with chains in place of layers is loaded by it."""
    torch.manual_seed(0)
    model, x = digits_net().eval(), torch.randn(32, 1, 8, 8)
    options = PlanOptions(methods=("factorize",), images=32)
    made = convpare.plan(model, x[:1], x, macs=0.6, criterion="sensitivity", options=options)
    assert made.factorizations
    small = convpare.apply(model, made, x)
    back = load_artifact(save(small, tmp_path / "net", spec="convpare:digits"))
    assert back.plan is not None
    assert back.plan.to_json() == plan_of(small).to_json()
    assert_same(back.module, small)


def test_another_number_of_classes_than_the_spec_builds(tmp_path):
    model = load_model("convpare:digits", num_classes=4).module
    folder = save(model, tmp_path / "net", spec="convpare:digits")
    assert_same(load(folder), model)


def test_torchvision_model(tmp_path):
    pytest.importorskip("torchvision")
    model = load_model("torchvision:shufflenet_v2_x0_5", num_classes=7).module
    folder = save(model, tmp_path / "net", spec="torchvision:shufflenet_v2_x0_5")
    assert_same(load(folder), model)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.norm = nn.InstanceNorm2d(24, affine=True, track_running_stats=True)
        self.act = nn.PReLU(24)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        return self.head(self.up(self.act(self.norm(self.grouped(x)))).mean((2, 3)))


@pytest.mark.parametrize("factory", [Grouped, mobilenet_v1_025])
def test_grouped_and_depthwise(tmp_path, factory):
    x = torch.randn(2, 3, 32, 32)
    model = pruned(scrambled(factory()), x)
    back = load(save(model, tmp_path / "net"), factory)
    assert_same(back, model)
    assert torch.equal(back(x), model(x))


class Pad(nn.Module):
    def __init__(self, before: int = 4) -> None:
        super().__init__()
        self.before = before
        self.dim = -1
        self._private = 5
        self.flag = True

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 0, 0, 0, self.before, 0))


class OtherPad(Pad):
    pass


@mends(Pad, "before")
def _mend_pad(module: nn.Module, keep: np.ndarray) -> None:
    module.before = int(keep[: module.before].sum())


class Untold(Pad):
    pass


@mends(Untold)
def _mend_untold(module: nn.Module, keep: np.ndarray) -> None:
    module.before = keep[: module.before].sum()  # a NumPy integer


class Padded(nn.Module):
    def __init__(self, kind: type[Pad]) -> None:
        super().__init__()
        self.a, self.pad, self.b = nn.Conv2d(3, 8, 1), kind(), nn.Conv2d(3, 12, 1)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pad(self.a(x)) + self.b(x))


@pytest.mark.parametrize("kind", [Pad, OtherPad, Untold])
def test_taught_classes(tmp_path, kind):
    x = torch.randn(2, 3, 8, 8)
    model = pruned(Padded(kind), x, seed=1)
    assert model.pad.before < 4
    back = load(save(model, tmp_path / "net"), lambda: Padded(kind))
    assert type(back.pad.before) is int and back.pad.before == model.pad.before
    assert torch.equal(back(x), model(x))


def test_a_class_that_is_no_longer_taught(tmp_path, monkeypatch):
    model = pruned(Padded(Pad), torch.randn(2, 3, 8, 8), seed=1)
    folder = save(model, tmp_path / "net")
    monkeypatch.delitem(artifact.numbers.__globals__["_NUMBERS"], Pad)
    assert load(folder, lambda: Padded(Pad)).pad.before == model.pad.before  # a count that shrank is taken as it is

    def smaller() -> nn.Module:
        built = Padded(Pad)
        built.pad.before = model.pad.before - 1
        return built

    with pytest.raises(ConvpareError, match=r"'pad'.*before is .*no larger"):
        load(folder, smaller)


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("one", torch.ones(3))
        self.register_buffer("two", self.one if tie else torch.ones(3))
        if tie:
            self.b.weight = self.a.weight
        self.again = self.a if tie else nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.b(self.a(x)))


def test_ties(tmp_path):
    model = Tied()
    folder = save(model, tmp_path / "net")
    assert sorted(load_file(folder / "model.safetensors")) == ["a.bias", "a.weight", "b.bias", "one"]
    for tie in (True, False):
        back = load(folder, lambda tie=tie: Tied(tie))
        assert back.b.weight is back.a.weight is back.again.weight
        assert back.one is back.two
        assert_same(back, model)


def test_a_module_shared_by_the_factory_only(tmp_path):
    folder = save(Tied(tie=False), tmp_path / "net")
    with pytest.raises(ConvpareError, match=r"'a\.weight' is tied.*in the artifact it is not"):
        load(folder, Tied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_types(tmp_path, small_pruned, dtype):
    model = copy.deepcopy(small_pruned).to(dtype)
    back = load(save(model, tmp_path / "net"), small)
    assert back.conv1.weight.dtype == dtype
    assert back.bn1.num_batches_tracked.dtype == torch.int64
    assert_same(back, model)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("index", torch.arange(6, dtype=torch.int16).reshape(2, 3).T)
        self.register_buffer("cache", torch.rand(4), persistent=False)
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer("none", None)
        self.empty = nn.Parameter(torch.rand(0, 3))
        self.scalar = nn.Parameter(torch.tensor(float("nan")), requires_grad=False)
        self.part = nn.Parameter(torch.rand(10)[2:5])
        self.layers = nn.ParameterList([torch.rand(2), torch.rand(3)])
        self.recurrent = nn.LSTM(2, 3)
        self.normed = weight_norm(nn.Conv2d(3, 4, 3))


def test_odd_tensors(tmp_path):
    model = Odd().to(memory_format=torch.channels_last)
    model.normed.bias.requires_grad_(False)  # not the factory's choice
    back = load(save(model, tmp_path / "net"), Odd)
    assert_same(back, model)
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in Odd().parameters()]
    x = torch.rand(5, 2)
    assert torch.equal(back.recurrent(x)[0], model.recurrent(x)[0])


def test_a_model_that_is_one_layer(tmp_path):
    model = nn.Conv2d(3, 5, 3)
    assert_same(load(save(model, tmp_path / "net"), lambda: nn.Conv2d(2, 2, 3)), model)


# ------------------------------------------------------------------------------------------------- what cannot be saved


class Stateful(nn.Linear):
    def get_extra_state(self) -> object:
        return {"anything": 1}


def lying() -> nn.Module:
    model = small()
    model.conv1.weight = nn.Parameter(torch.rand(7, 3, 3, 3))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stateful(2, 2), "_extra_state"),
        (lambda: nn.LazyLinear(3), "run the model once"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta tensor"),
        (lambda: nn.ParameterList([torch.rand(2, dtype=torch.complex128)]), "complex128"),
        (lambda: nn.ParameterList([torch.eye(2).to_sparse()]), "sparse"),
        (lying, "'conv1' has weight of shape"),
    ],
)
def test_models_that_cannot_be_saved(saved, make, message):
    before = (saved / "plan.json").read_bytes()
    with pytest.raises(ConvpareError, match=message):
        save(make(), saved)
    assert (saved / "plan.json").read_bytes() == before


@pytest.mark.parametrize("figures", [{"a": float("nan")}, {"a": np.float32(1)}, {"a": 10**200}, {"a": {1, 2}}])
def test_figures_must_be_json(tmp_path, small_pruned, figures):
    with pytest.raises(ConvpareError, match=r"JSON|a number of 201 digits"):
        save(small_pruned, tmp_path / "net", figures=figures)
    assert not os.listdir(tmp_path)


def test_what_could_not_be_read_is_not_written(tmp_path, small_pruned):
    nothing_left = Plan("M", (), "l2", {}, {}, Cost(1, 1, 1), Cost(0, 0, 0), (RemoveChannels("conv1", (), 16),))
    with pytest.raises(ConvpareError, match="must keep at least one"):
        save(small_pruned, tmp_path / "net", plan=nothing_left)
    with pytest.raises(ConvpareError, match="'spec' must be str or null"):
        save(small_pruned, tmp_path / "net", spec=5)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConvpareError, match="JSON"):
        save(small_pruned, tmp_path / "net", figures={"deep": deep})
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------------------------------------------- where it is saved


def test_an_artifact_is_replaced(saved):
    other = small()
    save(other, saved)
    assert_same(load(saved, small), other)
    assert os.listdir(saved.parent) == ["net"]


def test_an_empty_folder_is_replaced(tmp_path, small_pruned):
    (tmp_path / "net").mkdir()
    save(small_pruned, tmp_path / "net")
    assert is_artifact(tmp_path / "net")


def test_links_are_followed(tmp_path, saved):
    (tmp_path / "link").symlink_to(saved)
    other = small()
    assert save(other, tmp_path / "link") == saved
    assert (tmp_path / "link").is_symlink()
    assert_same(load(tmp_path / "link", small), other)
    assert is_artifact(tmp_path / "link")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize(
    "files",
    [["notes.txt"], ["plan.json"], ["model.safetensors"], ["plan.json", "model.safetensors", "model.onnx"]],
)
def test_a_foreign_folder_is_not_touched(tmp_path, small_pruned, files):
    (tmp_path / "net").mkdir()
    for name in files:
        (tmp_path / "net" / name).write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(ConvpareError, match="choose another folder"):
        save(small_pruned, tmp_path / "net")
    assert snapshot(tmp_path) == before


def test_a_file_is_not_touched(tmp_path, small_pruned):
    (tmp_path / "net").write_text("precious")
    for place in (tmp_path / "net", tmp_path / "net" / "below"):
        with pytest.raises(ConvpareError, match=r"is a file|File exists|Not a directory"):
            save(small_pruned, place)
        assert not is_artifact(place)
        with pytest.raises(ConvpareError, match="there is no file"):
            load(place)
    assert snapshot(tmp_path) == {"net": b"precious"}


@pytest.mark.parametrize("place", ["/", "/proc", "a\0b", "x" * 300])
def test_odd_places(small_pruned, place):
    assert not is_artifact(place)
    with pytest.raises(ConvpareError, match=r"there is no file|cannot be read"):
        load(place)
    with pytest.raises(ConvpareError, match=r"choose another folder|cannot be written"):
        save(small_pruned, place)


def test_the_working_directory_is_not_replaced(tmp_path, small_pruned, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvpareError, match="inside it"):
        save(small_pruned, ".")
    save(small_pruned, "net")
    assert is_artifact("net")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path, small_pruned):
    tmp_path.chmod(0o500)
    with pytest.raises(ConvpareError, match="Permission denied"):
        save(small_pruned, tmp_path / "net")


def test_a_system_folder_that_cannot_be_written(small_pruned):
    with pytest.raises(ConvpareError, match="cannot be written"):
        save(small_pruned, "/proc/net-of-nobody")


def test_a_full_disk(saved, small_pruned):
    before = snapshot(saved.parent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(ConvpareError, match=r"cannot be written.*free space"):
            save(small_pruned, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(saved.parent) == before


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_every_sync_may_fail(saved, small_pruned, monkeypatch, call, exchange):
    before = snapshot(saved.parent)
    calls = iter(range(1, 100))

    def fsync(_: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    if not exchange:
        without_exchange(monkeypatch)
    with pytest.raises(ConvpareError, match="No space left"):
        save(small(), saved)
    assert snapshot(saved.parent) == before


def without_exchange(monkeypatch) -> None:
    monkeypatch.setattr(artifact, "_exchange", lambda a, b: False)


def test_without_exchange(saved, monkeypatch):
    without_exchange(monkeypatch)
    other = small()
    save(other, saved)
    assert_same(load(saved, small), other)
    assert os.listdir(saved.parent) == ["net"]


def test_without_exchange_the_old_one_comes_back(saved, monkeypatch):
    without_exchange(monkeypatch)
    before, rename = snapshot(saved.parent), Path.rename

    def second_fails(self: Path, target: Path) -> Path:
        if target == saved and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(ConvpareError, match="Input/output error"):
        save(small(), saved)
    assert snapshot(saved.parent) == before


def test_a_kill_between_the_two_steps_is_recovered(saved, small_pruned):
    saved.rename(saved.with_name(".net.convpare-old"))
    assert is_artifact(saved)
    assert_same(load(saved, small), small_pruned)
    other = small()
    save(other, saved)
    assert_same(load(saved, small), other)
    assert os.listdir(saved.parent) == ["net"]


def test_what_killed_runs_left_behind_goes(saved):
    fresh, stale, foreign = (saved.with_name(f".net.convpare-{name}") for name in ("fresh", "stale", "foreign"))
    for folder in (fresh, stale, foreign):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    (foreign / "precious").write_text("not ours")
    for folder in (stale, foreign):
        os.utime(folder, (time.time() - 7200,) * 2)
    save(small(), saved)
    assert fresh.exists() and not stale.exists()
    assert os.listdir(foreign) == ["precious"]


# ---------------------------------------------------------------------------------------------------------------- kills

OLD, NEW = 1.0, 2.0
EVENTS = {  # that Python's audit reports
    "open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "ctypes.dlopen",
    "ctypes.dlsym",
}  # fmt: skip


def constant(value: float) -> nn.Module:
    model = nn.Linear(200, 200)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def value_of(folder: Path) -> float:
    """The one constant that all weights are, and the record says."""
    back = load_artifact(folder, lambda: nn.Linear(1, 1))
    values = torch.cat([p.flatten() for p in back.module.parameters()]).unique()
    assert values.tolist() == [back.figures["value"]]
    return float(back.figures["value"])


def save_constant(value: float, folder: Path) -> None:
    save(constant(value), folder, figures={"value": value})


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_random_moments(tmp_path, monkeypatch, exchange):
    if not exchange:
        without_exchange(monkeypatch)
    folder, moments = tmp_path / "net", random.Random(0)
    reader, writer = os.pipe()

    def save_for_ever() -> None:
        while True:
            for value in (NEW, OLD):
                save_constant(value, folder)
                os.write(writer, b".")

    save_constant(OLD, folder)
    for _ in range(20):
        pid = child(save_for_ever)
        assert os.read(reader, 1000)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert value_of(folder) in (OLD, NEW)
        assert is_artifact(folder)
    save_constant(3.0, folder)
    assert value_of(folder) == 3.0


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_every_step(tmp_path, monkeypatch, exchange):
    """Before the first, second, … file or folder that saving lists, makes, opens, renames or removes."""
    if not exchange:
        without_exchange(monkeypatch)
    folder = tmp_path / "net"

    def save_until(step: int) -> None:
        events = iter(range(step))

        def hook(event: str, _: object) -> None:
            if event in EVENTS and next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        model = constant(NEW)
        sys.addaudithook(hook)
        save(model, folder, figures={"value": NEW})

    found, status = [], -1
    while os.WIFSIGNALED(status) or status == -1:
        save_constant(OLD, folder)
        pid = child(lambda: save_until(len(found)))
        status = os.waitpid(pid, 0)[1]
        found.append(value_of(folder))
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(found) > 10
    assert found == sorted(found) and {OLD, NEW} == set(found)


# -------------------------------------------------------------------------------------------------------------- damage


def test_every_truncation_is_noticed(saved):
    for name, step in (("model.safetensors", 4096), ("plan.json", 64)):
        data = (saved / name).read_bytes()
        for length in [*range(0, len(data) - 1, step), len(data) - 2]:
            (saved / name).write_bytes(data[:length])
            with pytest.raises(ConvpareError, match=name.replace(".", r"\.")):
                load(saved, small)
        (saved / name).write_bytes(data)
    load(saved, small)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_flipped_bits_are_noticed(saved, small_pruned, name):
    data, places, whole = (saved / name).read_bytes(), random.Random(0), load_artifact(saved, small)
    noticed = 0
    for _ in range(200):
        flipped = bytearray(data)
        flipped[places.randrange(len(data))] ^= 1 << places.randrange(8)
        (saved / name).write_bytes(flipped)
        try:
            back = load_artifact(saved, small)
        except ConvpareError:
            noticed += 1
        else:
            assert_same(back.module, small_pruned)
            assert (back.plan, back.figures, back.preprocessing) == (whole.plan, whole.figures, whole.preprocessing)
    assert noticed == 200 if name == "model.safetensors" else noticed > 100


def test_an_edited_record_is_noticed(saved, small_pruned):
    record = json.loads((saved / "plan.json").read_text())
    (saved / "plan.json").write_text(json.dumps(record, indent=8, sort_keys=True))  # says the same
    assert_same(load(saved, small), small_pruned)
    record["figures"]["top1"] = 99.9
    (saved / "plan.json").write_text(json.dumps(record))
    with pytest.raises(ConvpareError, match=r"plan\.json cannot be used: its content and its checksum differ"):
        load(saved, small)


def test_a_missing_file_is_named(saved):
    (saved / "model.safetensors").unlink()
    assert not is_artifact(saved)
    with pytest.raises(ConvpareError, match=r"there is no file .*model\.safetensors"):
        load(saved, small)


def test_the_difference_is_named(saved):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    with pytest.raises(ConvpareError, match=f"size is {len(data) + 1}, plan.json says '{len(data)}'"):
        load(saved, small)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(ConvpareError, match="SHA-256 is"):
        load(saved, small)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_pickle_is_not_opened(saved, tmp_path, monkeypatch, sealed):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pt")
    for content in (pickle.dumps(Bomb()), (tmp_path / "bomb.pt").read_bytes()):
        if sealed:
            seal_weights(saved, content)
        else:
            (saved / "model.safetensors").write_bytes(content)
        with pytest.raises(ConvpareError, match=r"model\.safetensors"):
            load(saved, small)
    assert not Path("exploded").exists()


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\xff" * 64,
        struct.pack("<Q", 2**40),
        header(a={"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}),
        header(a={"dtype": "F32", "shape": [10**12], "data_offsets": [0, 0]}),
        header(a={"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}),
        header(a={"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}),
        header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}),
        header(a={"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}),
        header(a={"dtype": "X", "shape": [0], "data_offsets": [0, 0]}),
        header(a="[" * 100_000),
        struct.pack("<Q", 10_000) + b"[" * 10_000,
        header(),
    ],
)
def test_forged_weights(saved, weights):
    seal_weights(saved, weights)
    with pytest.raises(ConvpareError, match=r"model\.safetensors"):
        load(saved, small)


def edit(saved: Path, *path: str, to: object) -> None:
    record = json.loads((saved / "plan.json").read_text())
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    seal(saved, record)


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (["schema"], 2, r"written by a newer convpare \(schema 2; this one reads 1\): update"),
        (["schema"], True, "'schema' must be int, not True"),
        (["schema"], 0, "no schema 0"),
        (["model"], [], "'model' must be dict"),
        (["model", "class"], "ResNet", "is a 'ResNet', but the factory gives a 'CifarResNet'"),
        (["size"], 10**15, "size is"),
        (["size"], -1, "size is"),
        (["tensors", "conv1.weight", "shape"], [10**12], "different things of 'conv1.weight'"),
        (["tensors", "conv1.weight", "shape"], [3.0], "list of integers"),
        (["tensors", "conv1.weight", "dtype"], "float64", "different things of 'conv1.weight'"),
        (["tensors", "x"], {"shape": [], "dtype": "float32"}, "different things of 'x'"),
        (["aliases"], {"conv1.weight": "bn1.weight"}, "another name"),
        (["aliases"], {"x": "conv1.weight"}, "has no 'x'"),
        (["numbers", "conv1"], {"__class__": 1}, "'conv1': '__class__' is no number of Conv2d"),
        (["numbers", "conv1"], {"forward": 1}, "'forward' is no number"),
        (["numbers", "conv1"], {"stride": 1}, "'stride' is no number"),
        (["numbers", "conv1", "out_channels"], -1, "integer of 0 or more"),
        (["numbers", "conv1", "out_channels"], True, "integer of 0 or more"),
        (["numbers", "conv1", "out_channels"], "8", "integer of 0 or more"),
        (["numbers", "conv1", "out_channels"], 10**90, "call for"),
        (["numbers", "conv1", "groups"], 0, "call for"),
        (["numbers", "bn1", "num_features"], 0, "call for"),
        (["numbers", "nowhere"], {}, "no module 'nowhere'"),
        (["numbers", "layer1"], {"training": 1}, "'training' is no number of Sequential"),
        (["plan", "edits"], [{"edit": "run"}], "'run'"),
        (["preprocessing", "std"], [0], "preprocessing|std"),
        (["preprocessing", "mean"], [[0] * 100_000], "must be a list of numbers"),
        (["figures"], None, "'figures' must be dict, not None"),
    ],
)
def test_forged_records(saved, path, to, message):
    edit(saved, *path, to=to)
    with pytest.raises(ConvpareError, match=message) as caught:
        load(saved, small)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "plan.json"),
        (b"[]", "holds a list"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\xff\xfe{\0}\0", "utf-8"),
        (b'{"schema": 1, "figures": ' + b"[" * 200_000, "recursion"),
        (b'{"schema": NaN}', "no finite number"),
        (b'{"schema": 1e999}', "no finite number"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b" " * (artifact._RECORD_LIMIT + 1), "more than 16,777,216 bytes"),
    ],
)
def test_records_that_are_none(saved, text, message):
    (saved / "plan.json").write_bytes(text)
    with pytest.raises(ConvpareError, match=message):
        load(saved, small)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, 10**12, 10**40])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["__class__", "forward", "conv1", "conv1.weight", "float32", "../x", "os.system", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["__class__", "forward", "__dict__", "training", "weight", "conv1", ""]) | st.text(max_size=4)


def mutate(data: st.DataObject, record: dict[str, Any]) -> None:
    place: Any = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 4)):
            place = place[key]
            continue
        break
    action = data.draw(st.sampled_from(["replace", "replace", "delete", "add"]))
    if action == "delete":
        del place[key]
    elif action == "add" and isinstance(place, dict):
        place[data.draw(NAMES)] = place[key] if data.draw(st.booleans()) else data.draw(VALUES)
    else:
        place[key] = data.draw(VALUES)


@pytest.fixture(scope="module")
def forged(tmp_path_factory, small_pruned) -> tuple[Path, str]:
    folder = save(small_pruned, tmp_path_factory.mktemp("forged") / "net", plan=PLAN, figures={"a": [1]},
                  preprocessing=Preprocessing((0.5,), (0.5,)))  # fmt: skip
    return folder, (folder / "plan.json").read_text()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_forged_record_is_refused_or_read(forged, small_pruned, data):
    folder, text = forged
    record = json.loads(text)
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(data, record)
    seal(folder, record)
    try:
        model = load(folder, small)
    except ConvpareError as error:
        assert len(str(error)) < 2000
    else:
        assert [bits(x) for x in tensors(model).values()] == [bits(x) for x in tensors(small_pruned).values()]


# ---------------------------------------------------------------------------------------------------------- the factory


def test_nothing_named_in_an_artifact_is_imported(tmp_path, small_pruned, monkeypatch):
    (tmp_path / "sentinel_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for spec in ("sentinel_module:make", f"{tmp_path}/sentinel_module.py:make", "", "os:getcwd"):
        folder = save(small_pruned, tmp_path / "net", spec=spec)
        with pytest.raises(ConvpareError, match=r"pass factory=.*--model SPEC"):
            load(folder)
        assert_same(load(folder, small), small_pruned)
        assert load_artifact(folder, small).spec == spec
    assert "sentinel_module" not in sys.modules


def test_no_factory_and_no_spec(saved):
    with pytest.raises(ConvpareError, match=r"'CifarResNet'.*pass factory="):
        load(saved)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Grouped, "is a 'CifarResNet', but the factory gives a 'Grouped'"),
        (lambda: 5, "gives a 'int'"),
        (lambda: CifarResNet(2), r"has no 'layer1\.1\.conv1\.weight', 'layer1\.1\.bn1\.weight', .* and \d+ more"),
    ],
)
def test_the_wrong_factory(saved, factory, message):
    with pytest.raises(ConvpareError, match=message):
        load(saved, factory)


def test_a_factory_with_fewer_layers(tmp_path):
    folder = save(CifarResNet(2), tmp_path / "net")
    with pytest.raises(ConvpareError, match=r"no module 'layer1\.1\.conv1'; was it built with the same arguments"):
        load(folder, small)


def whole() -> nn.Module:
    model = nn.BatchNorm2d(3)
    model.running_mean = torch.ones(3, dtype=torch.int8)
    return model


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: nn.Conv2d(3, 4, 3), lambda: nn.Conv2d(3, 4, 5)),
        (lambda: nn.Conv2d(3, 4, 3), lambda: nn.Conv2d(3, 4, 3, bias=False)),
        (lambda: nn.Conv2d(3, 4, 3, bias=False), lambda: nn.Conv2d(3, 4, 3)),
        (lambda: nn.ParameterList([torch.rand(3)]), lambda: nn.ParameterList([torch.rand(3, 1)])),
        (whole, lambda: nn.BatchNorm2d(3)),
    ],
)
def test_a_factory_with_other_arguments(tmp_path, ours, theirs):
    folder = save(ours(), tmp_path / "net")
    with pytest.raises(ConvpareError, match="does not fit this"):
        load(folder, theirs)


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), {"in_channels": 4, "out_channels": 8, "groups": 2}),
        (nn.ConvTranspose1d(4, 6, 3), {"in_channels": 4, "out_channels": 6, "groups": 1}),
        (nn.Linear(3, 2), {"in_features": 3, "out_features": 2}),
        (nn.BatchNorm3d(7), {"num_features": 7}),
        (nn.InstanceNorm1d(7), {"num_features": 7}),
        (nn.PReLU(5), {"num_parameters": 5}),
        (ZeroPadShortcut(2, 8, 9), {"pad_before": 8, "pad_after": 9}),
        (Pad(3), {"before": 3}),
        (Untold(2), {"before": 2}),
        (nn.ReLU(), {}),
        (nn.Sequential(), {}),
    ],
)
def test_numbers(module, expected):
    assert numbers(module) == expected
    changed = {name: value + 1 for name, value in expected.items()}
    set_numbers(module, changed)
    assert numbers(module) == changed


@pytest.mark.parametrize("values", [{"in_features": 1, "x": 2}, {"in_features": 1, "out_features": 2.0}])
def test_set_numbers_is_all_or_nothing(values):
    module = nn.Linear(3, 2)
    with pytest.raises(ConvpareError, match=r"'x' is no number of Linear|Linear.out_features is 2\.0"):
        set_numbers(module, values)
    assert module.in_features == 3


def test_a_declared_number_must_be_one():
    module = Pad(3)
    module.before = 1.5
    with pytest.raises(ConvpareError, match=r"Pad\.before is 1\.5.*integer"):
        numbers(module)
