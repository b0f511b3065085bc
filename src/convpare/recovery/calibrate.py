"""Calibration: least squares or batch-norm recalibration, whichever brings the outputs nearer to the original's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from convpare.apply import graph_for, plan_of
from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.modes import eval_mode
from convpare.planning.plan import Plan
from convpare.planning.planner import calibration_images
from convpare.recovery.batch_norm import recalibrate_
from convpare.recovery.least_squares import Fitted, LeastSquares, compensate_

METHODS = ("calibrate", "least-squares", "batch-norm", "none")


@dataclass(frozen=True)
class RecoverOptions:
    """How accuracy is won back.

    Attributes:
        method: "least-squares", "batch-norm", or "calibrate": both (and neither) are tried, and the one whose
            outputs are nearest to the original's on calibration images that were not fitted to is taken.
        images: how many calibration images are used, a tenth of them for that comparison.
        seed: of the choice of images.
        least_squares: see `LeastSquares`.
    """

    method: str = "calibrate"
    images: int = 1024
    seed: int = 0
    least_squares: LeastSquares = field(default_factory=LeastSquares)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConvpareError(f"no recovery {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.images < 2:
            raise ConvpareError(f"recovery was given {self.images} image(s); at least 2 are needed")


@dataclass(frozen=True, eq=False)
class Recovered:
    """A recovered network, which method was taken, and the relative output error of each that was tried.

    The error is ‖outputs − original's‖² / ‖original's − their mean‖² on the images kept aside.
    """

    model: nn.Module
    method: str
    errors: dict[str, float]
    images: int
    fitted: Fitted | None


def recover(
    small: nn.Module,
    teacher: nn.Module,
    data: Data | ImageSet | Tensor,
    *,
    plan: Plan | None = None,
    options: RecoverOptions = RecoverOptions(),
    on_progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A copy of `small` whose weights are fitted to `teacher` on unlabelled images, without gradients.

    Args:
        small: what `apply` made of `teacher`.
        data: images (n, …), an image set, or data whose training images are taken. Labels are never used.
        plan: the plan that made `small`, where it does not carry it (a module built by hand).
        on_progress: called with (layers fitted, layers in all).

    Raises:
        ConvpareError: `small` carries no plan and none is given, or the images do not suit the network.
    """
    return recover_with(small, teacher, data, plan=plan, options=options, on_progress=on_progress).model


def recover_with(
    small: nn.Module,
    teacher: nn.Module,
    data: Data | ImageSet | Tensor,
    *,
    plan: Plan | None = None,
    options: RecoverOptions = RecoverOptions(),
    on_progress: Callable[[int, int], None] | None = None,
) -> Recovered:
    """As `recover`, with what was tried and what it gave."""
    plan = plan or plan_of(small)
    if plan is None:
        raise ConvpareError("this network carries no plan; give plan=, the one that made it from the teacher")
    images = calibration_images(data, options.images, options.seed)
    if images is None or len(images) < 2:
        raise ConvpareError(f"recovery needs at least 2 calibration images, {0 if images is None else len(images)} given")
    aside = max(1, len(images) // 10)
    held, fit = images[:aside], images[aside:]
    tries: dict[str, tuple[nn.Module, Fitted | None]] = {}
    if options.method in ("none", "calibrate"):
        tries["none"] = (copy.deepcopy(small), None)
    if options.method in ("batch-norm", "calibrate"):
        recalibrated = copy.deepcopy(small)
        recalibrate_(recalibrated, fit.split(128))
        tries["batch-norm"] = (recalibrated, None)
    if options.method in ("least-squares", "calibrate"):
        tries["least-squares"] = _least_squares(small, teacher, plan, fit, options, on_progress)
    reference = outputs(teacher, held)
    errors = {name: _error(outputs(model, held), reference) for name, (model, _) in tries.items()}
    best = min(errors, key=lambda name: errors[name])
    return Recovered(tries[best][0], best, errors, len(images), tries[best][1])


def _least_squares(
    small: nn.Module, teacher: nn.Module, plan: Plan, fit: Tensor, options: RecoverOptions,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[nn.Module, Fitted]:  # fmt: skip
    graph = graph_for(teacher, plan)
    student = copy.deepcopy(small)
    done = compensate_(student, teacher, graph, plan.keep(graph), fit, options.least_squares, on_progress)
    return student, done


def outputs(model: nn.Module, images: Tensor, batch_size: int = 128) -> Tensor:
    """The first output of `model` for images (n, …), in evaluation mode, without gradients."""
    with eval_mode(model), torch.no_grad():
        found = [model(batch) for batch in images.split(batch_size)]
    first = [f[0] if isinstance(f, list | tuple) else next(iter(f.values())) if isinstance(f, dict) else f for f in found]
    return torch.cat(first)


def _error(got: Tensor, reference: Tensor) -> float:
    error = (got - reference).double().square().sum()
    spread = (reference - reference.mean(0)).double().square().sum().clamp_min(1e-300)
    ratio = float(error / spread)
    return ratio if ratio == ratio else float("inf")
