"""The processes that train together: which one this is, its share of a batch, sums over all, and one word for all.

`accelerate launch` and `torchrun` start them, and accelerate connects them: gloo between processors, nccl between GPUs.
Where nothing was launched there is one process, every function here does nothing, and accelerate is not imported.

Gradients are summed in one flat tensor after the backward pass. `DistributedDataParallel` would do so while it runs,
which hides some of the time, but it takes the mean over processes instead of over images, which differs where shares
are uneven; it wants a name of its own for every weight, and to be told which parameters a step leaves out; and it fits
no network that is captured in parts. The sum is exact in all these cases, and has the same bits in every process.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.optional import import_extra

SILENCE = timedelta(hours=1)  # after which a process that still holds its connections is given up
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")  # by torchrun, by accelerate launch

T = TypeVar("T")


class OfOneProcess(ConvpareError):  # noqa: N818 - says whose error it is
    """An error that the other processes cannot know of, so that this one must say it."""


class Lost(OfOneProcess):
    """Another process has ended, or cannot be reached any more; `how` says how this one noticed."""

    def __init__(self, processes: "Processes", how: str) -> None:
        super().__init__(
            f"a process of {processes.count} was lost: process {processes.rank + 1} noticed by {how}. If the lost one "
            "gave no reason, it was killed, such as for lack of memory, or its machine is gone. Give the same command "
            "again, with as many processes or another number: training goes on from the state that was stored last."
        )


@dataclass(frozen=True)
class Processes:
    """One of several processes that do the same.

    Attributes:
        rank: which one this is; 0 is the main one, which prints, writes and evaluates.
        count: how many there are.
        device: where this one trains; None: where its network is.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """Which of so many images are this process's; the shares differ by one image at most."""
        return slice(batch * self.rank // self.count, batch * (self.rank + 1) // self.count)

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of floating-point tensors over all processes, in each tensor's shape and type.

        Raises:
            Lost: another process cannot be reached.
        """
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([x.detach().flatten() for x in tensors])  # of the widest type
        with self._connected():
            flat = import_extra("accelerate.utils", "train").reduce(flat, "sum")
        parts = flat.split([x.numel() for x in tensors])
        return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors, strict=True)]

    @torch.no_grad()
    def sum_gradients_(self, parameters: Iterable[nn.Parameter], others: Sequence[Tensor]) -> list[Tensor]:
        """Sum gradients over all processes, in place, and the `others` with them; parameters without any keep none."""
        if self.count == 1:
            return list(others)
        known = list(parameters)
        has = torch.tensor([float(p.grad is not None) for p in known], device=known[0].device)
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in known]
        had, *found = self.sums([has, *own, *others])
        for p, gradient, total, somewhere in zip(known, own, found[: len(known)], had.tolist(), strict=True):
            p.grad = gradient.copy_(total) if somewhere else None
        return found[len(known) :]

    def once(self, make: Callable[[], T]) -> T:
        """What `make` returns in the main process, which alone calls it; told to the others.

        Raises:
            ConvpareError: in all processes, if `make` raised it.
            Lost: another process cannot be reached.
        """
        if self.count == 1:
            return make()
        told: list[Any] = [None, None]
        wrong: ConvpareError | None = None
        if self.main:
            try:
                told[0] = make()
            except ConvpareError as error:
                wrong, told[1] = error, str(error)
        with self._connected():  # pickled, as torch does it, but only from the main process of this very job
            import_extra("accelerate.utils", "train").broadcast_object_list(told)
        if told[1] is not None:
            raise wrong or ConvpareError(told[1])
        return told[0]  # type: ignore[no-any-return]

    def follow_(self, model: nn.Module) -> None:
        """Give `model` the weights and buffers that it has in the main process."""
        if self.count == 1:
            return
        state = self.once(lambda: on_cpu(model.state_dict()))
        if not self.main:
            model.load_state_dict(state)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block, in the main process first: what is wrong there is raised in all, before the others come to it."""
        wrong: list[ConvpareError] = []

        def verdict() -> None:
            if wrong:
                raise wrong[0]

        if self.main:
            try:
                yield
            except ConvpareError as error:
                wrong.append(error)
            self.once(verdict)
            return
        self.once(verdict)
        try:
            yield
        except ConvpareError as error:
            raise OfOneProcess(f"process {self.rank + 1} of {self.count}: {error}") from error

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of whatever kind the backend has
            raise Lost(self, f"{type(error).__name__}: {_brief(str(error))}") from error


def on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """The same with its tensors where every process can take them up."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def several() -> bool:
    """Whether this process is one of several."""
    counts = [os.environ.get(name, "") for name in _COUNTS]
    launched = any(count.isdigit() and int(count) > 1 for count in counts)
    return launched or (_is_connected() and torch.distributed.get_world_size() > 1)


def current() -> Processes:
    """This process among those that were launched with it, connected to them.

    Raises:
        ConvpareError: there are several, but accelerate is not installed, or they do not find each other.
    """
    if not (several() or _is_connected() or any(name in os.environ for name in _LAUNCHED)):
        return Processes()
    accelerate = import_extra("accelerate", "train")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
    try:
        state = accelerate.PartialState(cpu=on_cpu, timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        raise ConvpareError(
            f"the processes of this job do not find each other ({error}): start them all by `accelerate launch` or "
            "torchrun, with one address and port of the main machine; or unset WORLD_SIZE for a single process."
        ) from error
    device = torch.device("cpu") if on_cpu else state.device
    return Processes(state.process_index, state.num_processes, device)


def leave() -> None:
    """Close the connections, when all is done."""
    if _is_connected():
        torch.distributed.destroy_process_group()


def _is_connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _brief(message: str) -> str:
    """The first sentence, without the place in the library's source."""
    return re.sub(r"^\[[^\]]*\]\s*", "", message.strip()).partition("\n")[0].partition(". ")[0]
