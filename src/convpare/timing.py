"""Latency of two networks, measured side by side."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convpare.modes import eval_mode


def side_by_side(models: Sequence[nn.Module], inputs: Sequence[Tensor], seconds: float = 2.0) -> list[float]:
    """Median milliseconds of one forward of each model on `inputs`, in turn (A B A B …) for about `seconds` in all.

    Evaluation mode, no gradients, on the device of the inputs with torch's current number of threads, after two
    rounds of warm-up.
    """
    times: list[list[float]] = [[] for _ in models]
    started = time.perf_counter()
    rounds = 0
    while rounds < 7 or time.perf_counter() - started < seconds:
        for model, mine in zip(models, times, strict=True):
            elapsed = _once(model, inputs)
            if rounds >= 2:
                mine.append(1000 * elapsed)
        rounds += 1
    return [statistics.median(mine) for mine in times]


def _once(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    with eval_mode(model), torch.no_grad():
        _synchronise(inputs)
        started = time.perf_counter()
        model(*inputs)
        _synchronise(inputs)
        return time.perf_counter() - started


def _synchronise(inputs: Sequence[Tensor]) -> None:
    if any(x.is_cuda for x in inputs):
        torch.cuda.synchronize()
