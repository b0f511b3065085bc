"""Plain supervised training: stochastic gradient descent on labelled images in memory, which can stop and go on."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn

from convpare.errors import ConvpareError

SCHEDULES = ("one-cycle", "cosine")
PADDINGS = ("zeros", "reflect")
_PEAK = 0.3  # the part of one cycle in which the learning rate rises
_FORMAT = "convpare training 1"


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained: SGD with Nesterov momentum on the cross-entropy.

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
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, choices in (("schedule", self.schedule, SCHEDULES), ("padding", self.padding, PADDINGS)):
            if value not in choices:
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
    labels: Tensor,
    options: TrainOptions = TrainOptions(),
    *,
    checkpoint: Path | None = None,
    on_progress: Callable[[EpochRecord], None] | None = None,
) -> tuple[EpochRecord, ...]:
    """Train `model` in place. Modes, gradients and the global generators are left as they were.

    With a checkpoint, the state is stored there after every epoch, in one safetensors file that replaces the one before
    at once. If the file is there at the start, training goes on after its last epoch, and on a CPU, with the same
    number of threads, ends with the very bits of a run that was never interrupted: the generators are seeded anew for
    each epoch, by the seed and its number.

    Args:
        model: (b, c, *spatial) -> (b, classes), on any device; parameters that require no gradient stay.
        images: (n, c, *spatial) floating point, preprocessed, on any device. Crops and flips are of the last two axes.
        labels: (n,) whole numbers.
        options: see `TrainOptions`.
        checkpoint: where the state is stored; None for nowhere.
        on_progress: called after every epoch, when it is stored.

    Returns:
        What happened in each epoch, those before an interruption included.

    Raises:
        ConvpareError: images, labels or outputs do not fit each other, the checkpoint is of another training, or the
            loss is not finite; the model's weights are then those of some step before.
    """
    run = _Run(model, images, labels, options)
    history = run.resume(checkpoint) if checkpoint is not None and checkpoint.exists() else []
    with _training_mode(model), _own_generators(run.device):
        for number in range(len(history) + 1, options.epochs + 1):
            history.append(run.epoch(number))
            if checkpoint is not None:
                _write(checkpoint, run.tensors(), run.signature(), history)
            if on_progress is not None:
                on_progress(history[-1])
    return tuple(history)


class _Run:
    """A model, what it is trained on, its optimizer, and what an epoch does with them."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, options: TrainOptions) -> None:
        _check_images(images, labels, options)
        self.model, self.images, self.labels, self.options = model, images, labels, options
        self.steps = math.ceil(len(images) / options.batch_size)
        self.classes = int(labels.max()) + 1
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ConvpareError("the model has no parameter that requires a gradient; there is nothing to train.")
        first = next(iter(self.trained.values()))
        self.device, self.dtype = first.device, first.dtype
        groups = [
            {"params": [p for p in self.trained.values() if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in self.trained.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=True)

    def epoch(self, number: int) -> EpochRecord:
        started = time.perf_counter()
        generator = self._seeded(number)
        order = torch.randperm(len(self.images), generator=generator)
        losses, right = [], torch.zeros((), dtype=torch.int64, device=self.device)
        for step, indices in enumerate(torch.tensor_split(order, self.steps)):
            x = self.images[indices.to(self.images.device)].to(self.device, self.dtype)
            y = self.labels[indices.to(self.labels.device)].to(self.device, torch.int64)
            logits = self._logits(augmented(x, self.options, generator))
            loss = F.cross_entropy(logits, y, reduction="sum")
            self._step(loss / len(y), (number - 1 + (step + 0.5) / self.steps) / self.options.epochs)
            losses.append(loss.detach())
            right += (logits.argmax(1) == y).sum()
        mean = float(torch.stack(losses).cpu().double().sum()) / len(self.images)
        if not math.isfinite(mean):
            raise ConvpareError(
                f"the loss is {mean} in epoch {number}, at a learning rate of up to {self.options.lr:g}: training has "
                f"diverged. Lower lr, such as to {self.options.lr / 3:.2g}; if that does not help, look for NaN or "
                "infinity in the images and the weights."
            )
        return EpochRecord(number, mean, 100 * int(right) / len(self.images), time.perf_counter() - started)

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            logits: Tensor = self.model(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ConvpareError(f"the model gave {got} for {len(x)} images; training needs (images, classes) outputs.")
        if logits.shape[1] < self.classes:
            raise ConvpareError(
                f"the labels go up to {self.classes - 1}, but the model has outputs for {logits.shape[1]} classes, "
                "counted from 0; build it with as many classes as the labels have."
            )
        return logits.float() if self.options.bf16 else logits

    def _step(self, loss: Tensor, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate(progress)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _seeded(self, number: int) -> torch.Generator:
        """A generator for the epoch's images; the global ones, which dropout reads, are seeded, too."""
        seeds = np.random.SeedSequence([self.options.seed, number]).generate_state(2, np.uint64).tolist()
        torch.default_generator.manual_seed(seeds[0])
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seeds[0])
        return torch.Generator().manual_seed(seeds[1])

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from epoch to epoch, by name."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, p in self.trained.items():
            if "momentum_buffer" in self.optimizer.state[p]:  # else it had no gradient
                state[f"momentum.{name}"] = self.optimizer.state[p]["momentum_buffer"]
        return state

    def signature(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        return {"options": asdict(self.options), "images": list(self.images.shape), "shapes": shapes}

    def resume(self, path: Path) -> list[EpochRecord]:
        """Take up the state of a checkpoint; what happened before it."""
        tensors, signature, history = _read(path)
        mine = self.signature()
        different = [name for name in mine if signature.get(name) != mine[name]]
        if different:
            raise ConvpareError(
                f"the checkpoint {path} is of a training with other {' and '.join(different)}; give the same ones to "
                "go on, another path, or delete it to start anew."
            )
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        for name, p in self.trained.items():
            if f"momentum.{name}" in tensors:
                self.optimizer.state[p]["momentum_buffer"] = tensors[f"momentum.{name}"].to(p)
        return history


def augmented(images: Tensor, options: TrainOptions, generator: torch.Generator) -> Tensor:
    """Images (b, c, *rest, h, w), each cropped and mirrored as the options say, at random; of the same shape."""
    if not options.crop and not options.flip:
        return images
    height, width = images.shape[-2:]
    planes = images.reshape(len(images), -1, height, width)
    if options.crop:
        planes = F.pad(planes, (options.crop,) * 4, mode="reflect" if options.padding == "reflect" else "constant")
    top, left = torch.randint(0, 2 * options.crop + 1, (2, len(images), 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if options.flip:
        mirrored = torch.rand(len(images), 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    each = torch.arange(len(images), device=images.device)
    picked = planes[each[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).reshape(images.shape).contiguous()


def _check_images(images: Tensor, labels: Tensor, options: TrainOptions) -> None:
    if images.ndim < 2 or not images.is_floating_point() or len(images) == 0:
        raise ConvpareError(
            f"images are {images.dtype}, {tuple(images.shape)}; give preprocessed floating-point images (n, c, ...)."
        )
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (len(images),) or not whole or int(labels.min()) < 0:
        raise ConvpareError(
            f"there are {len(images)} images and labels of shape {tuple(labels.shape)} and type {labels.dtype}; give "
            "one whole number per image, the index of its class from 0."
        )
    if (options.crop or options.flip) and images.ndim < 4:
        raise ConvpareError(f"images are {tuple(images.shape)}; crops and flips need (n, c, ..., height, width).")
    if options.padding == "reflect" and options.crop and options.crop >= min(images.shape[-2:]):
        raise ConvpareError(f"{tuple(images.shape[-2:])} pixels cannot be padded by reflecting {options.crop} of them.")


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in training mode, and give back modes and gradients, however the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, gradient in gradients:
            p.grad = gradient


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _write(path: Path, tensors: Mapping[str, Tensor], signature: Mapping[str, Any], history: list[EpochRecord]) -> None:
    about = {**signature, "history": [asdict(record) for record in history]}
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}  # tied ones share memory
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(safetensors.save(own, {"format": _FORMAT, "about": json.dumps(about)}))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[EpochRecord]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
        if metadata.get("format") != _FORMAT:
            raise ConvpareError(f"{path} is no checkpoint of a training; give another path or delete it.")
        about = json.loads(metadata["about"])
        history = [EpochRecord(**record) for record in about.pop("history")]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConvpareError(f"the checkpoint {path} is damaged ({error}); delete it to start anew.") from error
    return tensors, about, history
