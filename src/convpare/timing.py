"""How long things take, measured side by side."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convpare.modes import eval_mode

WARM_UP, LEAST = 2, 5  # rounds


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    lower: float
    upper: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        lower, median, upper = (float(q) for q in np.quantile(values, (0.25, 0.5, 0.75)))
        return Spread(median, lower, upper)

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "lower_quartile": self.lower, "upper_quartile": self.upper}


def in_turn(
    work: Sequence[Callable[[], object]], seconds: float, device: torch.device | None = None, *, warm_up: int = WARM_UP,
    least: int = LEAST,
) -> np.ndarray:  # fmt: skip
    """Milliseconds (rounds, things) of calls in turn (A B A B …) for about `seconds` in all.

    Args:
        device: whose work is waited for before the clock is read.
        warm_up: rounds that do not count.
        least: rounds at least that do.
    """
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < warm_up + least or time.perf_counter() - started < seconds:
        rounds.append([1000 * _once(call, device) for call in work])
    return np.array(rounds[warm_up:])


def _once(call: Callable[[], object], device: torch.device | None) -> float:
    _synchronise(device)
    started = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(models: Sequence[nn.Module], inputs: Sequence[Tensor], seconds: float = 2.0) -> list[float]:
    """Median milliseconds of one forward of each model on `inputs`, in turn for about `seconds` in all.

    Evaluation mode, no gradients, on the device of the inputs with torch's current number of threads.
    """
    with contextlib.ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(eval_mode(model))
        device = inputs[0].device if inputs else None
        times = in_turn([functools.partial(model, *inputs) for model in models], seconds, device)
    return [statistics.median(mine) for mine in times.T.tolist()]
