"""Times of layers: interpolated between points that are measured once, kept, and refused when they are of elsewhere."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from convpare.errors import ConvpareError
from convpare.planning import layer_times
from convpare.planning.layer_times import GRID, LayerTimes, Signature, Target, beside, cached, layer_onnx, staircase
from convpare.runtimes import onnx_session

CPU = torch.device("cpu")
CONV = Signature("conv", 2, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1))
DEPTHWISE = Signature("conv", 2, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), groups=0)


class Machine:
    """Takes a time that is bilinear in the channels, rounded up to multiples."""

    def __init__(self, step: int = 1) -> None:
        self.step, self.asked = step, []

    def __call__(self, signature: Signature, into: int, out: int) -> float:
        self.asked.append((signature, into, out))
        i, o = (-(-x // self.step) * self.step for x in (into, out))
        return 1.0 + 0.5 * i + 0.25 * o + 0.125 * i * o


def test_between_the_points_times_are_bilinear_and_each_point_is_measured_once():
    machine = Machine()
    times = LayerTimes(Target(), CPU, measure=machine)
    for into, out in itertools.product((1, 5, 16, 33, 100, 1000), repeat=2):
        expected = 1.0 + 0.5 * into + 0.25 * out + 0.125 * into * out
        assert times.milliseconds(CONV, into, out) == pytest.approx(expected)
    assert len(machine.asked) == len(set(machine.asked))
    measured = [(i, o) for signature, i, o in machine.asked if signature == CONV]
    assert {x for pair in measured for x in pair} <= set(GRID)


@pytest.mark.parametrize("step", [4, 8, 16])
def test_a_staircase_is_learnt_and_climbed(step: int):
    times = LayerTimes(Target(), CPU, measure=Machine(step))
    assert times.step(CONV) == step
    whole = times.milliseconds(CONV, 64, 64)
    assert times.milliseconds(CONV, 64 - step + 1, 64) == times.milliseconds(CONV, 64, 64 - step + 1) == whole
    assert times.milliseconds(CONV, 64 - step, 64) < whole


def test_depthwise_layers_have_one_number_of_channels():
    machine = Machine()
    times = LayerTimes(Target(), CPU, measure=machine)
    times.milliseconds(DEPTHWISE, 20, 40)
    assert {(i, o) for _, i, o in machine.asked} == {(16, 32), (24, 48)}
    layer = DEPTHWISE.module(6, 12)
    assert isinstance(layer, nn.Conv2d)
    assert (layer.groups, layer.in_channels, layer.out_channels) == (6, 6, 12)


@pytest.mark.parametrize(
    ("times", "step"),
    [
        ([float(c) for c in range(33, 65)], 1),
        ([float(-(-c // 8)) for c in range(33, 65)], 8),
        ([float(-(-c // 16)) for c in range(33, 65)], 16),
        ([1.0] * 32, 1),
        ([float(c % 7) for c in range(33, 65)], 1),
    ],
)
def test_staircases(times: list[float], step: int):
    assert staircase(range(33, 65), times) == step


def test_the_grid():
    assert list(GRID) == sorted(set(GRID))
    assert beside(1) == (1, 1)
    assert beside(17) == (16, 24)
    assert beside(64) == (64, 64)
    assert beside(65) == (64, 96)
    assert beside(10**6) == (10**6, 10**6)


LAYERS = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2), dilation=2, bias=False), (11, 12)),
    (nn.Conv2d(4, 6, (4, 3), padding="same", bias=False), (8, 8)),
    (nn.Conv2d(4, 6, 3, padding="valid", bias=False), (8, 8)),
    (nn.Conv1d(4, 8, 3, groups=2, bias=False), (10,)),
    (nn.Conv2d(4, 8, 3, groups=4, bias=False), (8, 8)),
    (nn.Conv3d(2, 3, 2, bias=False), (4, 4, 4)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False), (5, 6)),
    (nn.Linear(4, 6, bias=False), ()),
]


@pytest.mark.parametrize(("module", "extent"), LAYERS, ids=lambda x: str(x)[:40])
def test_a_signature_is_the_layer(module: nn.Module, extent: tuple[int, ...]):
    """Rebuilt from its signature with its channels it has the same settings, and onnxruntime computes the same."""
    signature = Signature.of(module, 3, extent)
    into, out = module.weight.shape[1], module.weight.shape[0]  # type: ignore[index,union-attr]
    if isinstance(module, nn.modules.conv._ConvNd):
        into, out = module.in_channels, module.out_channels
    again = signature.module(into, out)
    assert str(again) == str(module)
    x = signature.input(into)
    with torch.no_grad():
        expected = again(x)
    (got,) = onnx_session(layer_onnx(again, x), [x], 1)()
    assert torch.allclose(torch.from_numpy(got), expected, atol=1e-5)


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_layers_are_really_timed(runtime: str):
    times = LayerTimes(Target(runtime, 2, 1), CPU)
    known = [times._point(signature, 4, 8) for signature in (CONV, DEPTHWISE, Signature("linear", 3))]
    assert all(0 < ms < 1000 for ms in known)


def test_times_are_kept(tmp_path: Path):
    machine, store = Machine(), tmp_path / "cache" / "times.json"
    times = LayerTimes(Target(threads=1), CPU, store, machine)
    first = times.milliseconds(CONV, 20, 20)
    times.save()
    silent = Machine()
    again = LayerTimes(Target(threads=1), CPU, store, silent)
    assert again.milliseconds(CONV, 20, 20) == first
    assert silent.asked == []
    assert [path.name for path in store.parent.iterdir()] == ["times.json"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 1}', '"' + "[" * 100_000])
def test_a_damaged_cache_is_refused(tmp_path: Path, content: str):
    store = tmp_path / "times.json"
    store.write_text(content)
    with pytest.raises(ConvpareError, match=r"times.json is no table of times of this machine .*; remove it"):
        LayerTimes(Target(), CPU, store)


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity", '"x"', "[]", "null"])
def test_times_that_are_no_times_are_refused(tmp_path: Path, value: str):
    store = tmp_path / "times.json"
    times = LayerTimes(Target(), CPU, store, Machine())
    times.milliseconds(CONV, 8, 8)
    times.save()
    content = store.read_text().replace('"8,8": 15.0', f'"8,8": {value}')
    assert value in content
    store.write_text(content)
    with pytest.raises(ConvpareError, match="remove it"):
        LayerTimes(Target(), CPU, store)


def test_times_of_elsewhere_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONVPARE_CACHE", str(tmp_path))
    times = cached(Target(threads=1), CPU)
    times.measure = Machine()
    times.milliseconds(CONV, 8, 8)
    times.save()
    (file,) = tmp_path.iterdir()
    assert cached(Target(threads=1), CPU).points == times.points
    assert cached(Target(threads=2), CPU).points == {}
    other = json.loads(file.read_text())
    other["machine"]["processor"] = "another one"
    file.write_text(json.dumps(other))
    with pytest.raises(ConvpareError, match="it holds something else"):
        cached(Target(threads=1), CPU)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CONVPARE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = cached(Target(), CPU).store
    assert store is not None
    assert store.parent == tmp_path / "convpare"
    monkeypatch.setenv("CONVPARE_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    times = cached(Target(), CPU)
    with pytest.raises(ConvpareError, match="cannot be kept in"):
        times.save()


def test_targets():
    assert Target(threads=3).cores == 3
    assert Target().cores == torch.get_num_threads()
    for given, message in (
        ({"runtime": "tensorrt"}, "no runtime 'tensorrt'"),
        ({"batch": 0}, "batch is 0"),
        ({"threads": 0}, "threads is 0"),
    ):
        with pytest.raises(ConvpareError, match=message):
            Target(**given)  # type: ignore[arg-type]
    assert layer_times.machine_of(Target("compile", threads=1), CPU) == layer_times.machine_of(Target(threads=1), CPU)
