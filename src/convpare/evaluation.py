"""How often a network is right."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convpare.data import ImageSet
from convpare.errors import ConvpareError
from convpare.modes import eval_mode
from convpare.notebook import html_text

Batches = Iterable[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Evaluation:
    """How often a network was right.

    Attributes:
        top1: per cent of the images whose class has the highest output.
        top5: per cent of the images whose class has one of the five highest outputs; None below ten classes.
        images: how many images were shown.
        seconds: wall-clock time, decoding included.
    """

    top1: float
    top5: float | None
    images: int
    seconds: float

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", {self.top5:.2f} % top-5"
        return f"{self.top1:.2f} % top-1{top5} on {self.images:,} images in {self.seconds:.1f} s"

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain JSON values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return html_text(str(self))


def evaluate(
    model: nn.Module,
    images: ImageSet | Batches,
    *,
    limit: int | None = None,
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Show labelled images to `model`, in evaluation mode, and count how often it is right.

    Afterwards every module is in the mode it was in. Images go to the device and type of the model's first parameter.

    Args:
        model: (b, c, h, w) -> (b, classes).
        images: an image set, or any (images, labels) batches.
        limit: show this many images only: a fixed random choice of an image set, the first ones of batches.
        batch_size: images at a time, for an image set.
        on_progress: called with (images done, images in all, or 0 if that is not known) after every batch.

    Raises:
        ConvpareError: there are no images or no labels, a label has no output, or the model's outputs are not finite
            numbers of shape (b, classes).
    """
    if limit is not None and limit < 1:
        raise ConvpareError(f"limit is {limit}; it must be 1 or more, or None for all images.")
    batches, total = _batches(images, limit, batch_size)
    started = time.perf_counter()
    seen, right1, right5, classes = 0, 0, 0, 0
    with eval_mode(model), torch.inference_mode():
        for x, labels in batches:
            best, classes = _five_best(model, x, labels)
            right1 += int(best[:, 0].sum())
            right5 += int(best.sum())
            seen += len(x)
            if on_progress is not None:
                on_progress(seen, total)
    if seen == 0:
        raise ConvpareError("there are no images to evaluate on; at least one is needed.")
    top5 = 100 * right5 / seen if classes >= 10 else None
    return Evaluation(100 * right1 / seen, top5, seen, time.perf_counter() - started)


def _five_best(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Whether the k-th highest output is the label's, (b, 5) or fewer than five, and the number of outputs."""
    outputs = _outputs(model, x)
    _check_labels(labels, outputs)
    best = outputs.topk(min(5, outputs.shape[1])).indices
    return best == labels[:, None].to(best.device), outputs.shape[1]


def _batches(
    images: ImageSet | Batches, limit: int | None, batch_size: int
) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    if not isinstance(images, ImageSet):
        return _labelled(_first(images, limit)), limit or 0
    whole = limit is None or limit >= len(images)
    batches = images.batches(batch_size, limit=limit, seed=None if whole else 0)
    return _labelled(batches), len(images) if limit is None else min(limit, len(images))


def _first(batches: Batches, limit: int | None) -> Batches:
    left = limit
    for x, labels in batches:
        if left is None:
            yield x, labels
            continue
        yield x[:left], None if labels is None else labels[:left]
        left -= len(x)
        if left <= 0:
            return


def _labelled(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    for x, labels in batches:
        if labels is None:
            raise ConvpareError("accuracy needs labels and these images have none; give images in class folders.")
        if labels.shape != (len(x),) or labels.is_floating_point():
            raise ConvpareError(
                f"a batch of {len(x)} images has labels of shape {tuple(labels.shape)} and type {labels.dtype}; "
                "expected one whole number per image, the index of its class."
            )
        yield x, labels


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    parameter = next(model.parameters(), None)
    if parameter is not None:
        x = x.to(parameter.device, parameter.dtype if parameter.is_floating_point() else None)
    try:
        outputs = model(x)
    except RuntimeError as error:
        raise ConvpareError(
            f"the model failed on images of shape {tuple(x.shape)}: {error}. Give images of the size and channels that "
            "it was made for, or --resize and --crop."
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(x):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConvpareError(
            f"the model gave {got} for {len(x)} images; accuracy needs a classifier's (images, classes) tensor."
        )
    if not torch.isfinite(outputs).all():
        raise ConvpareError("the model's outputs hold NaN or infinity; its weights or the preprocessing are wrong.")
    return outputs


def _check_labels(labels: Tensor, outputs: Tensor) -> None:
    if len(labels) == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs.shape[1]:
        raise ConvpareError(
            f"the labels go from {low} to {high}, but the model has {outputs.shape[1]} outputs, for classes 0 to "
            f"{outputs.shape[1] - 1}. Give images of the classes that the model was trained on, and their order with "
            "--classes if their folders are not in it."
        )
