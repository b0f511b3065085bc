"""What a network learns from a batch of images: their labels, or what another network makes of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.modes import eval_mode
from convpare.recovery.features import Features, heard
from convpare.redundancy.moments import first_tensor
from convpare.redundancy.taps import call, suited

SHOWN = 512  # images that the spread of the teacher's outputs is measured on
FEATURES = 3.0  # what the features' error counts beside that of the outputs
LABELS = 0.1  # what the cross-entropy counts beside the error of the outputs, where there are labels

Network = Callable[[Tensor], Any]


class Objective(Protocol):
    """What is to become small."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of the images' losses, and how many of them come out right."""

    def to_json(self) -> dict[str, Any]:
        """What it is, so that a training that goes on can be compared."""


@dataclass(frozen=True)
class CrossEntropy:
    """That of the labels, which are whole numbers from 0 to `classes` - 1."""

    classes: int

    def __call__(self, model: Network, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if labels is None:
            raise ConvpareError("training on labels needs some; give them, or imitate another network")
        logits = _logits(model(images), len(images), self.classes)
        return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()

    def to_json(self) -> dict[str, Any]:
        return {"classes": self.classes}


@dataclass(frozen=True, eq=False)
class Imitation:
    """The squared error of the first tensor that a network returns against the teacher's, as a share of the variance of
    the teacher's over images, and that of features which both have; with labels, a cross-entropy beside it. Labels are
    needed for that alone.

    An image is right where the largest output is the labelled one, or without labels the teacher's; of outputs that
    are no classes none is.

    Attributes:
        teacher: in evaluation mode; no gradient of it is computed.
        variance: of its outputs over images, summed over their elements.
        labels: the cross-entropy; None: none.
        weight: what it counts.
        features: what is compared beside the outputs.
        strength: what that counts.
    """

    teacher: nn.Module
    variance: float
    labels: CrossEntropy | None = None
    weight: float = LABELS
    features: Features = field(default_factory=Features)
    strength: float = FEATURES

    @staticmethod
    def of(
        teacher: nn.Module, images: Tensor, labels: CrossEntropy | None = None, student: nn.Module | None = None,
        strength: float = FEATURES,
    ) -> "Imitation":  # fmt: skip
        """With the variance over the first of these images; with a student, features that it shares.

        Raises:
            ConvpareError: the teacher's outputs are the same for all of them, or not finite.
        """
        shown = images[:SHOWN]
        with eval_mode(teacher), torch.no_grad():
            outputs = [first_tensor(call(teacher, suited(batch, teacher))) for batch in shown.split(64)]
        variance = float(torch.cat(outputs).double().flatten(1).var(0, correction=0).sum())
        if not 0 < variance < torch.inf:
            raise ConvpareError(
                f"the variance of the original's outputs over {len(shown)} images is {variance}; there is nothing to "
                "imitate"
            )
        features = Features() if student is None or not strength else Features.shared(teacher, student, shown[:64])
        return Imitation(teacher, variance, labels, features=features, strength=strength)

    def to_json(self) -> dict[str, Any]:
        labels = None if self.labels is None else {**self.labels.to_json(), "weight": self.weight}
        return {"labels": labels, "features": list(self.features.names), "strength": self.strength}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        with eval_mode(self.teacher), torch.no_grad(), heard(self.teacher, self.features.names) as theirs:
            wanted = first_tensor(self.teacher(images)).float()
        with heard(model, self.features.names) as own:
            outputs = first_tensor(model(images)).float()
        loss = (outputs - wanted).square().sum() / self.variance
        if self.features.names:
            loss = loss + self.strength * self.features.error(own, theirs)
        if self.labels is not None:
            supervised, right = self.labels(lambda _: outputs, images, labels)
            return loss + self.weight * supervised, right
        if outputs.ndim != 2:
            return loss, torch.zeros((), dtype=torch.int64, device=loss.device)
        return loss, (outputs.argmax(1) == wanted.argmax(1)).sum()


def _logits(outputs: Any, images: int, classes: int) -> Tensor:
    """The outputs, one for each class and image. Raises ConvpareError if they are anything else."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != images:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConvpareError(f"the model gave {got} for {images} images; training needs (images, classes) outputs.")
    if outputs.shape[1] < classes:
        raise ConvpareError(
            f"the labels go up to {classes - 1}, but the model has outputs for {outputs.shape[1]} classes, counted "
            "from 0; build it with as many classes as the labels have."
        )
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
