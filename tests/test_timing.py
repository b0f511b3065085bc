"""Networks are timed in turn, in evaluation mode, and left as they were."""

import time

import pytest
import torch
from torch import Tensor, nn

from convpare import timing
from convpare.timing import side_by_side


class Sleeper(nn.Module):
    def __init__(self, seconds: float, log: list[tuple[float, bool, bool]]) -> None:
        super().__init__()
        self.seconds, self.log, self.inner = seconds, log, nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        self.log.append((self.seconds, self.training or self.inner.training, torch.is_grad_enabled()))
        time.sleep(self.seconds)
        return x


def test_medians_in_milliseconds():
    log: list[tuple[float, bool, bool]] = []
    models = [Sleeper(0.001, log), Sleeper(0.01, log)]
    models[1].inner.eval()
    fast, slow = side_by_side(models, [torch.zeros(1)], seconds=0.0)
    assert 1 <= fast < 8 < slow < 100
    assert [entry[0] for entry in log] == [0.001, 0.01] * 7  # in turn; two rounds warm up, five count
    assert not any(training or grad for _, training, grad in log)
    assert models[0].training and models[0].inner.training
    assert models[1].training and not models[1].inner.training
    assert torch.is_grad_enabled()


def test_it_stops_after_about_the_time(monkeypatch: pytest.MonkeyPatch):
    clock = iter(float(i) for i in range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    log: list[tuple[float, bool, bool]] = []
    took = side_by_side([Sleeper(0.0, log)], [torch.zeros(1)], seconds=60.0)
    assert took == [1000.0]  # one tick of this clock a forward
    assert 15 <= len(log) <= 25  # three ticks a round


def test_several_inputs():
    class Sum(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return x + z

    assert len(side_by_side([Sum()], [torch.zeros(1), torch.ones(1)], seconds=0.0)) == 1
    assert side_by_side([], [torch.zeros(1)], seconds=0.0) == []
