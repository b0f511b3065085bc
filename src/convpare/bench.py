"""Whole networks timed side by side, in the runtimes, batch sizes and numbers of threads that they will run with."""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convpare import __version__
from convpare.errors import ConvpareError
from convpare.modes import eval_mode
from convpare.notebook import html_table
from convpare.planning.cost import Cost, count
from convpare.runtimes import RUNTIMES, processor, ready, torch_threads
from convpare.timing import Spread, in_turn

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        runtimes: of `RUNTIMES`.
        batches: numbers of images in a batch.
        threads: numbers of threads; None: torch's current number.
        seconds: of each setting, all networks together.
        seed: of the noise that networks are shown.
    """

    runtimes: tuple[str, ...] = ("eager",)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] | None = None
    seconds: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for runtime in self.runtimes:
            if runtime not in RUNTIMES:
                raise ConvpareError(f"no runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
        for name in ("runtimes", "batches", "threads"):
            values = getattr(self, name)
            if values is not None and (not values or any(isinstance(v, int) and v < 1 for v in values)):
                raise ConvpareError(f"{name} are {values}; expected at least one, and numbers of 1 or more")
        if not self.seconds >= 0:
            raise ConvpareError(f"seconds is {self.seconds}; expected a number of 0 or more")


@dataclass(frozen=True)
class Setting:
    """One runtime, batch size and number of threads.

    Attributes:
        milliseconds: of one forward of each network.
        speedups: of each network, how many times as fast as the first, from round to round.
        rounds: how many times each ran.
    """

    runtime: str
    batch: int
    threads: int
    milliseconds: tuple[Spread, ...]
    speedups: tuple[Spread, ...]
    rounds: int

    def to_json(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "batch": self.batch,
            "threads": self.threads,
            "rounds": self.rounds,
            "milliseconds": [spread.to_json() for spread in self.milliseconds],
            "speedups": [spread.to_json() for spread in self.speedups],
        }


@dataclass(frozen=True)
class Bench:
    """Timings of several networks.

    Attributes:
        names: of the networks; the first is what others are compared with.
        costs: of one image.
    """

    names: tuple[str, ...]
    costs: tuple[Cost, ...]
    settings: tuple[Setting, ...]
    machine: Mapping[str, Any]

    def share(self, setting: Setting, network: int) -> float:
        """The speed-up as a share of the ratio of the MACs: 1 where time goes as MACs go."""
        ratio = self.costs[0].macs / max(self.costs[network].macs, 1)
        return setting.speedups[network].median / max(ratio, 1e-300)

    def to_json(self) -> dict[str, Any]:
        return {
            "networks": [
                {"name": name, **cost.to_json()} for name, cost in zip(self.names, self.costs, strict=True)
            ],
            "settings": [
                {**s.to_json(), "share_of_macs_ratio": [self.share(s, n) for n in range(len(self.names))]}
                for s in self.settings
            ],
            "measured_on": dict(self.machine),
        }  # fmt: skip

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        columns = ("runtime", "batch", "threads", "network", "ms", "quartiles", "speed-up", "share of the MACs ratio")
        rows = [
            (s.runtime, s.batch, s.threads, name, f"{ms.median:.3f}", f"{ms.lower:.3f}–{ms.upper:.3f}",
             f"{s.speedups[n].median:.2f}", f"{self.share(s, n):.2f}")
            for s in self.settings for n, (name, ms) in enumerate(zip(self.names, s.milliseconds, strict=True))
        ]  # fmt: skip
        return html_table(columns, rows, f"{self.machine['processor']}, torch {self.machine['torch']}")


def bench(
    models: Mapping[str, nn.Module],
    example: Tensor,
    options: BenchOptions = BenchOptions(),
    on_progress: Tell | None = None,
) -> Bench:
    """Time networks in turn (A B A B …), in evaluation mode and without gradients, on noise.

    Args:
        models: by name; the first is what the others are compared with.
        example: one input with the batch first; its first dimension is replaced by each batch size.

    Raises:
        ConvpareError: a network does not run on such inputs, a runtime is missing or cannot take a network, or gives
            other outputs than torch.
    """
    if not models:
        raise ConvpareError("nothing to measure: give at least one network")
    tell = on_progress or (lambda *_: None)
    costs = tuple(count(model, example[:1]).total for model in models.values())
    threads = (torch.get_num_threads(),) if options.threads is None else options.threads
    wanted = list(itertools.product(options.runtimes, options.batches, threads))
    found = []
    for done, (runtime, batch, cores) in enumerate(wanted):
        tell(f"timing {runtime}", done, len(wanted))
        generator = torch.Generator().manual_seed(options.seed)
        noise = torch.randn(batch, *example.shape[1:], generator=generator).to(example)
        found.append(_measured(list(models.values()), noise, runtime, cores, options.seconds))
    return Bench(tuple(models), costs, tuple(found), machine(example.device))


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    return {
        "device": str(device), "processor": processor(device), "torch": torch.__version__, "convpare": __version__,
    }  # fmt: skip


def _measured(models: Sequence[nn.Module], noise: Tensor, runtime: str, threads: int, seconds: float) -> Setting:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        for model in models:
            stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        times = in_turn([ready(runtime, model, [noise]) for model in models], seconds, noise.device)
    ratios = times[:, :1] / np.maximum(times, 1e-9)
    return Setting(runtime, len(noise), threads, _spreads(times), _spreads(ratios), len(times))


def _spreads(table: np.ndarray) -> tuple[Spread, ...]:
    return tuple(Spread.of(column) for column in table.T.tolist())
