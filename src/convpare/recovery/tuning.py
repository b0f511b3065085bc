"""Training after calibration: the smaller network imitates the original, without labels or with them."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.notebook import html_text
from convpare.recovery.checkpoint import read_checkpoint
from convpare.recovery.objectives import FEATURES, CrossEntropy, Imitation
from convpare.recovery.outputs import outputs, relative_error
from convpare.recovery.processes import current
from convpare.recovery.training import EpochRecord, TrainOptions, augmented, train_
from convpare.redundancy.taps import suited

TUNINGS = ("distill", "finetune")
EPOCHS = 5
PROBED = 3  # steps that tell how long training takes
AGREE = 0.9  # share of images that the original must take for the same before they are cropped or mirrored
SHOWN = 256  # images that tell so
ASIDE = 1000  # images at most, and a tenth at most, that are not trained on

USUAL = TrainOptions(epochs=EPOCHS, lr=0.05, weight_decay=1e-4, norms="frozen", clip=0.5)


@dataclass(frozen=True)
class TuneOptions:
    """How the smaller network is trained.

    Attributes:
        epochs: passes over the images; None: `EPOCHS`, or as many as fit in `minutes`.
        minutes: how long training may take, estimated from its first steps; where not even one pass fits, fewer images.
        images: how many are used, at most; None: all training images.
        lr: the highest learning rate; None: that of `training`.
        batch_size: images in a step; None likewise.
        features: what the error of features counts beside that of the outputs; 0: outputs alone.
        training: all else; None: `USUAL`, in bfloat16 where the processor is made for it, with those crops and mirror
            images that the original takes for the same pictures.

    Raises:
        ConvpareError: on construction, for epochs and minutes at once, or numbers below what makes sense.
    """

    epochs: int | None = None
    minutes: float | None = None
    images: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    features: float = FEATURES
    training: TrainOptions | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.minutes is not None:
            raise ConvpareError("give epochs or minutes, not both")
        if self.epochs is not None and self.epochs < 1:
            raise ConvpareError(f"epochs is {self.epochs}; expected 1 or more")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConvpareError(f"minutes is {self.minutes}; expected a number above 0")
        if self.images is not None and self.images < 2:
            raise ConvpareError(f"images is {self.images}; expected 2 or more")
        if not 0 <= self.features < math.inf:
            raise ConvpareError(f"features is {self.features}; expected a number of 0 or more")
        self.over(self.training or USUAL)

    def over(self, training: TrainOptions) -> TrainOptions:
        """These options with the learning rate and batch size that are given."""
        lr = training.lr if self.lr is None else self.lr
        return replace(training, lr=lr, batch_size=training.batch_size if self.batch_size is None else self.batch_size)


@dataclass(frozen=True, eq=False)
class Tuned:
    """A trained network and how it came to be.

    Attributes:
        model: the result.
        history: what happened in each epoch.
        options: what was chosen.
        images: how many were trained on.
        labelled: whether their labels were looked at.
        errors: the relative error of the outputs (see `Recovered`) on images kept aside, before and after.
        seconds: of training alone, before an interruption, too.
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    options: TrainOptions
    images: int
    labelled: bool
    errors: tuple[float, float]
    seconds: float

    @property
    def passes(self) -> int:
        """Images times epochs: how often a gradient of an image was computed."""
        return self.images * len(self.history)

    def __str__(self) -> str:
        epochs = "1 epoch" if len(self.history) == 1 else f"{len(self.history)} epochs"
        return (
            f"{epochs} of {self.images:,} images {'with' if self.labelled else 'without'} labels, {self.passes:,} "
            f"gradients of images (relative output error on others: {self.errors[0]:.3g} → {self.errors[1]:.3g})"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "epochs": [asdict(record) for record in self.history],
            "options": asdict(self.options),
            "images": self.images,
            "labels": self.labelled,
            "gradient_passes": self.passes,
            "relative_output_error": list(self.errors),
            "seconds": round(self.seconds, 3),
        }

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return html_text(f"training: {self}")


def tune(
    small: nn.Module,
    teacher: nn.Module,
    data: Data | ImageSet | Tensor,
    *,
    labels: bool = False,
    options: TuneOptions = TuneOptions(),
    seed: int = 0,
    checkpoint: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Train a copy of `small` to put out what `teacher` does, on all training images; with `labels`, these count, too.

    Args:
        small: what `apply` made of `teacher`, calibrated or not.
        data: images (n, …), an image set, or data whose training images are taken.
        seed: of the order of images, of augmentation and of which are kept aside.
        checkpoint: see `train_`; there training goes on, too.
        on_step: called with (steps done, of how many).

    Where several processes were launched, each calls this; the main one's weights and choices hold (see `train_`).
    Launched processes train on the device that they were given, such as a GPU each; the result is where `small` is.

    Raises:
        ConvpareError: there are too few images or no labels, the images do not suit the networks, or as `train_`.
    """
    processes = current()
    images, known = _training_images(data, options.images, seed)
    if labels and known is None:
        raise ConvpareError("fine-tuning needs labelled images; distill needs none")
    aside = max(1, min(ASIDE, len(images) // 10))
    images = suited(images, teacher)
    held, images = images[:aside], images[aside:]
    wanted = known[aside:] if labels and known is not None else None
    home = next((p.device for p in small.parameters()), images.device)
    place = processes.device or home
    held, teacher, student = held.to(place), copy.deepcopy(teacher).to(place), copy.deepcopy(small).to(place)
    if images.ndim == 4:
        teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    processes.follow_(teacher)
    shown = images[:SHOWN].to(place)
    training = processes.once(lambda: replace(options.over(options.training or suitable(teacher, shown)), seed=seed))
    supervised = None if wanted is None else CrossEntropy(int(wanted.max()) + 1)
    objective = Imitation.of(teacher, images, supervised, student, options.features)
    training, count = _within(student, images, wanted, training, objective, options, checkpoint)
    images, wanted = images[:count], None if wanted is None else wanted[:count]
    reference = outputs(teacher, held)
    before = relative_error(outputs(student, held), reference)
    history = train_(
        student, images, wanted, training, objective=objective, checkpoint=checkpoint, on_step=on_step,
    )  # fmt: skip
    seconds = sum(record.seconds for record in history)
    after = relative_error(outputs(student, held), reference)
    return Tuned(student.to(home), history, training, len(images), wanted is not None, (before, after), seconds)


def suitable(teacher: nn.Module, images: Tensor) -> TrainOptions:
    """What suits the processor and these images (n, c, h, w), as the teacher takes them."""
    crop, flip = _augmentation(teacher, images[:SHOWN])
    return replace(USUAL, crop=crop, flip=flip, bf16=has_bf16(images.device) and not _depthwise(teacher))


def _augmentation(teacher: nn.Module, images: Tensor) -> tuple[int, bool]:
    """How far images may be shifted, and whether mirrored, so that the teacher still gives (nearly) all its answers."""
    answers = outputs(teacher, images)
    if images.ndim < 4 or answers.ndim != 2:
        return 0, False
    crop = max(1, min(images.shape[-2:]) // 8)

    def agreed(other: Tensor) -> bool:
        same = outputs(teacher, other).argmax(1) == answers.argmax(1)
        return float(same.float().mean()) >= AGREE

    shifted = augmented(images, TrainOptions(crop=crop), torch.Generator().manual_seed(0))
    return crop if agreed(shifted) else 0, agreed(images.flip(-1))


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _depthwise(model: nn.Module) -> bool:
    """Whether some convolution has one channel a group: these are slower in bfloat16 on processors."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return any(m.groups > 1 and m.groups == m.in_channels for m in convolutions)


def _within(
    student: nn.Module, images: Tensor, labels: Tensor | None, training: TrainOptions, objective: Imitation,
    options: TuneOptions, checkpoint: Path | None,
) -> tuple[TrainOptions, int]:  # fmt: skip
    """The options with a number of epochs, and how many images they are of; those of the checkpoint, if it is there."""
    if options.minutes is None:
        return replace(training, epochs=options.epochs or training.epochs), len(images)
    processes = current()

    def stored() -> tuple[TrainOptions, int] | None:
        if checkpoint is None or not checkpoint.exists():
            return None
        _, about = read_checkpoint(checkpoint)
        try:
            return replace(training, epochs=about["options"]["epochs"]), int(about["images"][0])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConvpareError(f"the checkpoint {checkpoint} is damaged; delete it to start anew.") from error

    if (known := processes.once(stored)) is not None:
        return known
    some = images[: training.batch_size * (1 + PROBED)]
    passes = 1 if len(some) > training.batch_size else 2  # two steps at least
    stamps: list[float] = []
    train_(
        copy.deepcopy(student), some, None if labels is None else labels[: len(some)], replace(training, epochs=passes),
        objective=objective, on_step=lambda *_: stamps.append(time.perf_counter()),
    )  # fmt: skip
    each = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    affordable = max(1, int(60 * options.minutes / processes.once(lambda: each)))
    epochs = max(1, affordable // math.ceil(len(images) / training.batch_size))
    return replace(training, epochs=epochs), min(len(images), affordable * training.batch_size)


def _training_images(data: Data | ImageSet | Tensor, limit: int | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """At most `limit` images and their labels, if they have any, in an order drawn by `seed`."""
    if isinstance(data, Tensor):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        images, labels = data[order[:limit].to(data.device)], None
    else:
        batches = list((data.train if isinstance(data, Data) else data).batches(limit=limit, seed=seed))
        images = torch.cat([x for x, _ in batches])
        known = [y for _, y in batches if y is not None]
        labels = torch.cat(known) if known else None
    if len(images) < 2:
        raise ConvpareError(f"training needs 2 images at least, one of them to compare on; {len(images)} given")
    if not torch.isfinite(images).all():
        raise ConvpareError("the training images contain NaN or infinite values")
    return images, labels
