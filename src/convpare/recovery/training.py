"""Training: stochastic gradient descent on images in memory, by labels or another network; it can stop and go on."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.recovery.borrowed import channels_last, own_generators, running_statistics, training_mode
from convpare.recovery.checkpoint import read_checkpoint, write_checkpoint
from convpare.recovery.objectives import CrossEntropy, Objective
from convpare.recovery.processes import OfOneProcess, Processes, current, on_cpu

SCHEDULES = ("one-cycle", "cosine")
PADDINGS = ("zeros", "reflect")
NORMS = ("batch", "frozen")
_PEAK = 0.3  # the part of one cycle in which the learning rate rises
SAVED_EVERY = 60.0  # seconds, within an epoch


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained: SGD with Nesterov momentum.

    Attributes:
        epochs: passes over the images.
        batch_size: images in a step, at most; the batches of an epoch differ by one image at most.
        lr: the highest learning rate.
        momentum: in (0, 1).
        weight_decay: of weights; parameters of one dimension (biases, scales of normalisations) have none.
        schedule: of the learning rate over all steps. "one-cycle": linearly from 0 to `lr` in the first 0.3 and back to
            0; "cosine": from `lr` to 0 along half a cosine.
        crop: each image is padded by so many pixels and cut back to its size at a random place; 0 for none.
        padding: what to pad with, "zeros" or "reflect".
        flip: mirror every other image, at random.
        bf16: autocast to bfloat16 (weights and their updates stay as they are).
        norms: batch norms take the statistics of a "batch", or their own, "frozen": then what calibration made of
            them holds from the first step on, and an image's output does not hang on the others of its batch.
        clip: gradients whose norm is above are scaled down to it; 0: none.
        ema: the result is an average of the weights over the steps, in which each step counts so much as often as the
            next (and less in the first steps); 0: the last weights.
        seed: of the order of the images, augmentation and dropout.

    Raises:
        ConvpareError: on construction, for any other value.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "one-cycle"
    crop: int = 0
    padding: str = "zeros"
    flip: bool = False
    bf16: bool = False
    norms: str = "batch"
    clip: float = 0.0
    ema: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("schedule", SCHEDULES), ("padding", PADDINGS), ("norms", NORMS)):
            if (value := getattr(self, name)) not in choices:
                raise ConvpareError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
        if min(self.epochs, self.batch_size) < 1 or min(self.crop, self.seed) < 0:
            raise ConvpareError(
                f"epochs is {self.epochs}, batch_size {self.batch_size}, crop {self.crop}, seed {self.seed}; the first "
                "two must be 1 or more, the others 0 or more."
            )
        if not (0 < self.lr < math.inf and 0 < self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise ConvpareError(
                f"lr is {self.lr}, momentum {self.momentum}, weight_decay {self.weight_decay}; expected lr above 0, "
                "momentum between 0 and 1, and weight_decay 0 or above."
            )
        if not (0 <= self.ema < 1 and 0 <= self.clip < math.inf):
            raise ConvpareError(
                f"ema is {self.ema}, clip {self.clip}; expected 0 for none, ema below 1 such as 0.999, clip above 0."
            )

    @property
    def frozen(self) -> bool:
        """Whether batch norms keep their statistics."""
        return self.norms == "frozen"

    def learning_rate(self, progress: float) -> float:
        """The learning rate when this part of all steps, in [0, 1], is done."""
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * min(progress / _PEAK, (1 - progress) / (1 - _PEAK))


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the images: its number from 1, the mean loss, per cent right meanwhile, and how long it took."""

    number: int
    loss: float
    top1: float
    seconds: float


def train_(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    options: TrainOptions = TrainOptions(),
    *,
    objective: Objective | None = None,
    checkpoint: Path | None = None,
    on_progress: Callable[[EpochRecord], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[EpochRecord, ...]:
    """Train `model` in place. Modes, gradients and the global generators are left as they were.

    With a checkpoint, the state is stored there after every epoch and once a minute, in one safetensors file that
    replaces the one before at once. If the file is there at the start, training goes on after that step, and on a CPU,
    with the same number of threads, ends with the very bits of a run that was never interrupted: the generators are
    seeded anew for each epoch, by the seed and its number, and within an epoch they are in the file.

    Where several processes were launched (`processes`), each calls this with the same arguments and takes its share of
    every batch. They start from the main one's weights or checkpoint, which it alone reads and writes, and what they
    learn is that of one process but for the order in which sums are taken, dropout, and batch norms that take the
    statistics of a batch: those take that of a share, and their running statistics are the shares' mean.

    Args:
        model: (b, c, *spatial) -> (b, classes), or what the objective says; on any device. Parameters that require no
            gradient stay.
        images: (n, c, *spatial) floating point, preprocessed, on any device. Crops and flips are of the last two axes.
        labels: (n,) whole numbers; None for an objective that needs none.
        options: see `TrainOptions`.
        objective: what is to become small; None: the cross-entropy of the labels.
        checkpoint: where the state is stored; None for nowhere.
        on_progress: called after every epoch, when it is stored.
        on_step: called after every step with (steps done, of how many).

    Returns:
        What happened in each epoch, those before an interruption included.

    Raises:
        ConvpareError: images, labels or outputs do not fit each other, the checkpoint is of another training, or the
            loss is not finite; the model's weights are then those of some step before.
        Lost: another process has ended.
    """
    processes = current()
    run = _Run(model, images, labels, options, objective, processes)
    own = checkpoint if processes.main else None
    stored = time.monotonic()

    def after_step() -> None:
        nonlocal stored
        if own is not None and time.monotonic() - stored >= SAVED_EVERY:
            write_checkpoint(own, run.tensors(), run.about())
            stored = time.monotonic()
        if on_step is not None:
            on_step(run.steps * len(run.history) + run.done, run.steps * options.epochs)

    with training_mode(model, options.frozen), channels_last(model, images), own_generators(run.device):
        run.start(checkpoint)
        while len(run.history) < options.epochs:
            run.epoch(after_step)
            if own is not None:
                write_checkpoint(own, run.tensors(), run.about())
                stored = time.monotonic()
            if on_progress is not None:
                on_progress(run.history[-1])
        run.take_average()
    return tuple(run.history)


class _Run:
    """A model, what it is trained on, its optimizer, how far it has come, and what an epoch does with them."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor | None, options: TrainOptions,
        objective: Objective | None, processes: Processes,
    ) -> None:  # fmt: skip
        _check_images(images, labels, options)
        if labels is None and objective is None:
            raise ConvpareError("training on labels needs some; give them, or an objective that needs none.")
        self.model, self.images, self.labels, self.options, self.processes = model, images, labels, options, processes
        self.objective = objective or CrossEntropy(int(labels.max()) + 1)  # type: ignore[union-attr]
        self.steps = math.ceil(len(images) / options.batch_size)
        if (smallest := len(images) // self.steps) < processes.count:
            raise ConvpareError(
                f"{processes.count} processes cannot share batches of {smallest}; start fewer of them, or give a "
                "larger batch_size or more images."
            )
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ConvpareError("the model has no parameter that requires a gradient; there is nothing to train.")
        first = next(iter(self.trained.values()))
        self.device, self.dtype = first.device, first.dtype
        self.running = running_statistics(model, options.frozen) if processes.count > 1 else []
        groups = [
            {"params": [p for p in self.trained.values() if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in self.trained.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=True)
        self.average: dict[str, Tensor] = {}
        self.history: list[EpochRecord] = []
        self.done = 0  # steps of the epoch that is under way
        self.seconds = 0.0  # spent on it
        self.losses: list[Tensor] = []
        self.right = torch.zeros((), dtype=torch.int64, device=self.device)
        self.generator = torch.Generator()  # of the images

    def epoch(self, after_step: Callable[[], None]) -> None:
        """All steps of an epoch, or those that are left of it."""
        started = time.perf_counter() - self.seconds
        number, under_way = len(self.history) + 1, self._generators() if self.done else None
        self._seed(number)
        order = torch.randperm(len(self.images), generator=self.generator)
        if under_way is not None:
            self._set_generators(under_way)
        for indices in torch.tensor_split(order, self.steps)[self.done :]:
            share = self.processes.share(len(indices))
            mine = indices[share]
            x = self.images[mine.to(self.images.device)].to(self.device, self.dtype)
            y = None
            if self.labels is not None:
                y = self.labels[mine.to(self.labels.device)].to(self.device, torch.int64)
            x = augmented(x, self.options, self.generator, len(indices), share)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
                loss, right = self.objective(self.model, x, y)
            self.optimizer.zero_grad()
            (loss / len(indices)).backward()
            loss, right = self._of_all(loss.detach(), right, len(mine) / len(indices))
            self._step((number - 1 + (self.done + 0.5) / self.steps) / self.options.epochs)
            self.losses.append(loss)
            self.right += right
            self.done += 1
            self.seconds = time.perf_counter() - started
            if self.done < self.steps:
                after_step()
        mean = float(torch.stack(self.losses).cpu().double().sum()) / len(self.images)
        if not math.isfinite(mean):
            raise ConvpareError(
                f"the loss is {mean} in epoch {number}, at a learning rate of up to {self.options.lr:g}: training has "
                f"diverged. Lower lr, such as to {self.options.lr / 3:.2g}; if that does not help, look for NaN or "
                "infinity in the images and the weights."
            )
        self.history.append(EpochRecord(number, mean, 100 * int(self.right) / len(self.images), self.seconds))
        self.done, self.seconds, self.losses = 0, 0.0, []
        self.right.zero_()
        after_step()

    def _of_all(self, loss: Tensor, right: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Make gradients and running statistics those of all processes; their loss, and how many came out right."""
        if self.processes.count == 1:
            return loss, right
        means = [x * share for x in self.running]
        loss, count, *means = self.processes.sum_gradients_(self.trained.values(), [loss, right.float(), *means])
        for running, mean in zip(self.running, means, strict=True):
            running.copy_(mean)
        return loss, count.to(right.dtype)

    def _step(self, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate(progress)
        if self.options.clip:
            nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip)
        self.optimizer.step()
        if self.options.ema:
            self._add_to_average(self.steps * len(self.history) + self.done)

    @torch.no_grad()
    def _add_to_average(self, steps: int) -> None:
        state = self.model.state_dict()
        if not self.average:
            self.average = {name: value.clone() for name, value in state.items()}
        kept = min(self.options.ema, (1 + steps) / (10 + steps))
        for name, value in state.items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - kept)
            else:
                self.average[name].copy_(value)

    def take_average(self) -> None:
        """The average of the weights in place of the last ones, if there is one."""
        if self.average:
            self.model.load_state_dict(self.average)

    def _seed(self, number: int) -> None:
        """Seed the generators of an epoch: of its images, and the global ones, which dropout reads.

        The images' is the same in all processes; the global ones differ, so that shares do not drop the same.
        """
        seeds = np.random.SeedSequence([self.options.seed, number]).generate_state(2, np.uint64).tolist()
        self.generator.manual_seed(seeds[1])
        if not self.processes.main:
            mine = [self.options.seed, number, self.processes.rank]
            seeds = np.random.SeedSequence(mine).generate_state(1, np.uint64).tolist()
        torch.default_generator.manual_seed(seeds[0])
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seeds[0])

    def _generators(self) -> dict[str, Tensor]:
        found = {"images": self.generator.get_state(), "global": torch.get_rng_state()}
        return found | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {})

    def _set_generators(self, states: dict[str, Tensor]) -> None:
        self.generator.set_state(states["images"])
        if not self.processes.main:  # the global ones are the main process's
            return
        torch.set_rng_state(states["global"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step, by name."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, p in self.trained.items():
            if "momentum_buffer" in self.optimizer.state[p]:  # else it had no gradient
                state[f"momentum.{name}"] = self.optimizer.state[p]["momentum_buffer"]
        state |= {f"average.{name}": value for name, value in self.average.items()}
        if self.done:
            state |= {f"generator.{name}": value for name, value in self._generators().items()}
            state |= {"epoch.losses": torch.stack(self.losses), "epoch.right": self.right}
        return state

    def about(self) -> dict[str, Any]:
        """Where it is, and what must be the same for it to go on."""
        history = [asdict(record) for record in self.history]
        return {**self._signature(), "history": history, "step": self.done, "seconds": self.seconds}

    def _signature(self) -> dict[str, Any]:
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        return {
            "options": asdict(self.options), "objective": self.objective.to_json(), "images": list(self.images.shape),
            "labels": self.labels is not None, "shapes": shapes,
        }  # fmt: skip

    def _different(self, about: dict[str, Any]) -> list[str]:
        """What another training has otherwise."""
        return [name for name, mine in self._signature().items() if about.get(name) != mine]

    def start(self, checkpoint: Path | None) -> None:
        """Take up the state of the checkpoint, if it is there; in other processes than the main one, its state."""

        def of_main() -> tuple[dict[str, Tensor], dict[str, Any]] | None:
            if checkpoint is not None and checkpoint.exists():
                self.resume(checkpoint)
            if self.processes.count == 1:
                return None
            return on_cpu(self.tensors()), self.about()

        state = self.processes.once(of_main)
        if state is None or self.processes.main:
            return
        if different := self._different(state[1]):
            raise OfOneProcess(
                f"process {self.processes.rank + 1} of {self.processes.count}: its {' and '.join(different)} are not "
                "the main process's; give all processes the same network and images."
            )
        self._take(*state)

    def resume(self, path: Path) -> None:
        """Take up the state of a checkpoint."""
        tensors, about = read_checkpoint(path)
        if different := self._different(about):
            raise ConvpareError(
                f"the checkpoint {path} is of a training with other {' and '.join(different)}; give the same ones to "
                "go on, another path, or delete it to start anew."
            )
        try:
            self._take(tensors, about)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConvpareError(f"the checkpoint {path} is damaged ({error}); delete it to start anew.") from error

    def _take(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        history = [EpochRecord(**record) for record in about["history"]]
        state = {name: tensors[f"model.{name}"] for name in self.model.state_dict()}
        self.model.load_state_dict(state)
        if any(name.startswith("average.") for name in tensors):
            own = self.model.state_dict()
            self.average = {name: tensors[f"average.{name}"].to(value.device) for name, value in own.items()}
        for name, p in self.trained.items():
            if f"momentum.{name}" in tensors:
                self.optimizer.state[p]["momentum_buffer"] = tensors[f"momentum.{name}"].to(p)
        self.history, self.done, self.seconds = history, int(about["step"]), float(about["seconds"])
        if self.done:
            self.losses = list(tensors["epoch.losses"].to(self.device))
            self.right = tensors["epoch.right"].to(self.device)
            start = "generator."
            self._set_generators({n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)})


def augmented(
    images: Tensor, options: TrainOptions, generator: torch.Generator, batch: int | None = None,
    share: slice = slice(None),
) -> Tensor:  # fmt: skip
    """Images (b, c, *rest, h, w), each cropped and mirrored as the options say, at random; of the same shape.

    Where they are a share of a batch of so many, chance is drawn for the whole batch: it falls the same on each image.
    """
    if not options.crop and not options.flip:
        return images
    height, width = images.shape[-2:]
    planes = images.reshape(len(images), -1, height, width)
    if options.crop:
        planes = F.pad(planes, (options.crop,) * 4, mode="reflect" if options.padding == "reflect" else "constant")
    count = len(images) if batch is None else batch
    top, left = torch.randint(0, 2 * options.crop + 1, (2, count, 1), generator=generator)[:, share]
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if options.flip:
        mirrored = torch.rand(count, 1, generator=generator)[share] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    each = torch.arange(len(images), device=images.device)
    picked = planes[each[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).reshape(images.shape).contiguous()


def _check_images(images: Tensor, labels: Tensor | None, options: TrainOptions) -> None:
    if images.ndim < 2 or not images.is_floating_point() or len(images) == 0:
        raise ConvpareError(
            f"images are {images.dtype}, {tuple(images.shape)}; give preprocessed floating-point images (n, c, ...)."
        )
    if labels is not None:
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.shape != (len(images),) or not whole or int(labels.min()) < 0:
            raise ConvpareError(
                f"there are {len(images)} images and labels of shape {tuple(labels.shape)} and type {labels.dtype}; "
                "give one whole number per image, the index of its class from 0."
            )
    if (options.crop or options.flip) and images.ndim < 4:
        raise ConvpareError(f"images are {tuple(images.shape)}; crops and flips need (n, c, ..., height, width).")
    if options.padding == "reflect" and options.crop and options.crop >= min(images.shape[-2:]):
        raise ConvpareError(f"{tuple(images.shape[-2:])} pixels cannot be padded by reflecting {options.crop} of them.")
