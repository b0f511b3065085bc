"""Networks timed side by side: what is compared is what was measured, and what a runtime computes is checked."""

import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convpare import bench as module
from convpare import runtimes
from convpare.bench import BenchOptions, bench
from convpare.errors import ConvpareError
from convpare.planning.cost import count
from convpare.runtimes import RUNTIMES, ready, torch_threads
from convpare.timing import Spread, in_turn

X = torch.zeros(1, 3, 12, 12)
FAST = BenchOptions(seconds=0.0)


def net(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(width, 4, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def test_figures_come_from_the_rounds(monkeypatch: pytest.MonkeyPatch):
    """Medians of times, and of ratios of each round: a slow round slows both and leaves the ratio."""
    times = np.array([[2.0, 1.0], [20.0, 10.0], [4.0, 2.0], [4.0, 1.0], [2.0, 1.0]])
    monkeypatch.setattr(module, "in_turn", lambda calls, seconds, device: times)
    models = {"wide": net(16).eval(), "narrow": net(4).eval()}
    found = bench(models, X, FAST)
    (setting,) = found.settings
    assert [spread.median for spread in setting.milliseconds] == [4.0, 1.0]
    assert setting.milliseconds[0] == Spread(4.0, 2.0, 4.0)
    assert setting.speedups[0] == Spread(1.0, 1.0, 1.0)
    assert setting.speedups[1] == Spread(2.0, 2.0, 2.0)
    wide, narrow = (count(model, X).total for model in models.values())
    assert found.costs == (wide, narrow)
    assert found.share(setting, 1) == pytest.approx(2.0 / (wide.macs / narrow.macs))
    told = found.to_json()
    assert json.loads(json.dumps(told)) == told
    assert told["settings"][0]["speedups"][1]["median"] == 2.0
    assert [entry["name"] for entry in told["networks"]] == ["wide", "narrow"]
    assert told["measured_on"]["torch"] == torch.__version__


def test_every_setting_is_measured_and_all_is_left_as_it_was():
    seen: list[tuple[int, int, bool, bool]] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                seen.append((len(x), torch.get_num_threads(), self.training, torch.is_grad_enabled()))
            return self.conv(x)

    model = Watched()
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    options = BenchOptions(batches=(1, 3), threads=(1, 2), seconds=0.0)
    found = bench({"net": model}, X, options)
    assert [(s.runtime, s.batch, s.threads, s.rounds) for s in found.settings] == [
        ("eager", batch, threads, 5) for batch in (1, 3) for threads in (1, 2)
    ]
    assert {entry[:2] for entry in seen if len(seen)} >= {(1, 1), (1, 2), (3, 1), (3, 2)}
    assert not any(training for _, _, training, _ in seen)
    assert torch.get_num_threads() == before
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_calls_in_turn():
    log: list[str] = []
    times = in_turn([lambda: log.append("a"), lambda: log.append("b")], 0.0)
    assert times.shape == (5, 2)
    assert (times > 0).all()
    assert log == ["a", "b"] * 7


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "compile"])
def test_a_runtime_computes_what_torch_computes(runtime: str):
    if runtime == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    model = net().train()
    x = torch.randn(2, 3, 12, 12)
    with torch_threads(1):
        run = ready(runtime, model, [x])
        assert model.training and all(m.training for m in model.modules())
        model.eval()
        with torch.no_grad():
            (got,) = run()
            assert torch.allclose(got, model(x), atol=1e-5)


def test_another_function_is_noticed(monkeypatch: pytest.MonkeyPatch):
    class Session:
        def __init__(self, factor: float, rows: int) -> None:
            self.factor, self.rows = factor, rows

        def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], list[Tensor]]:
            return lambda: [self.factor * model(*inputs)[: self.rows]]

    x = torch.randn(2, 3, 12, 12)
    monkeypatch.setattr(runtimes, "_session", Session(1.1, 2))
    with pytest.raises(ConvpareError, match="onnxruntime gives other outputs than torch: they differ by"):
        ready("onnxruntime", net(), [x])
    monkeypatch.setattr(runtimes, "_session", Session(float("nan"), 2))
    with pytest.raises(ConvpareError, match="they differ by nan"):
        ready("onnxruntime", net(), [x])
    monkeypatch.setattr(runtimes, "_session", Session(1.0, 1))
    with pytest.raises(ConvpareError, match=r"onnxruntime gives outputs of \[\(1, 5\)\], torch gives \[\(2, 5\)\]"):
        ready("onnxruntime", net(), [x])


def test_what_cannot_be_exported_is_said():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y if float(y.sum()) > 0 else -y

    with pytest.raises(ConvpareError, match="Branch cannot be exported to ONNX: "):
        ready("onnxruntime", Branch(), [torch.randn(1, 3, 8, 8)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runtimes": ("tensorrt",)}, f"no runtime 'tensorrt'; choose one of {', '.join(RUNTIMES)}"),
        ({"runtimes": ()}, r"runtimes are \(\); expected at least one"),
        ({"batches": (0,)}, r"batches are \(0,\); expected at least one, and numbers of 1 or more"),
        ({"threads": ()}, r"threads are \(\)"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, object], message: str):
    with pytest.raises(ConvpareError, match=message):
        BenchOptions(**given)  # type: ignore[arg-type]


def test_networks_that_do_not_run():
    with pytest.raises(ConvpareError, match="at least one network"):
        bench({}, X)
    with pytest.raises(ConvpareError, match="does not run"):
        bench({"net": net().eval()}, torch.zeros(1, 5, 12, 12), FAST)
    with pytest.raises(ConvpareError, match="no runtime"):
        ready("tensorrt", net(), [X])
    with pytest.raises(ConvpareError, match=r"Sequential does not run on 1×2×12×12: RuntimeError: "):
        ready("eager", net(), [torch.zeros(1, 2, 12, 12)])
