"""Calibration: least squares or batch-norm recalibration, whichever brings the outputs nearer to the original's."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from convpare.apply import graph_for, merged_for, plan_of
from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.graph.surgery import removed
from convpare.modes import eval_mode
from convpare.planning.plan import Plan
from convpare.planning.planner import calibration_images
from convpare.recovery.batch_norm import norms_of, recalibrate_
from convpare.recovery.least_squares import Fitted, LeastSquares, compensate_
from convpare.redundancy.moments import first_tensor
from convpare.redundancy.taps import suited

METHODS = ("calibrate", "least-squares", "batch-norm", "none")
LEAST = 4  # images: two to fit to, two to compare on


@dataclass(frozen=True)
class RecoverOptions:
    """How accuracy is won back.

    Attributes:
        method: "least-squares", "batch-norm", or "calibrate": both (and neither) are tried, and the one whose
            outputs are nearest to the original's on calibration images that were not fitted to is taken.
        images: how many calibration images are used, a tenth of them (at least two) for that comparison.
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
        if self.images < LEAST:
            raise ConvpareError(f"recovery is to use {self.images} image(s); at least {LEAST} are needed")


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
    held, fit = _images_for(teacher, plan, data, options)
    tries: dict[str, tuple[nn.Module, Fitted | None]] = {}
    if options.method in ("none", "calibrate"):
        tries["none"] = (copy.deepcopy(small), None)
    if options.method == "batch-norm" or (options.method == "calibrate" and norms_of(small)):
        tries["batch-norm"] = (_recalibrated(small, fit), None)
    if options.method in ("least-squares", "calibrate"):
        tries["least-squares"] = _least_squares(small, teacher, plan, fit, options, on_progress)
    reference = outputs(teacher, held)
    errors = {name: _error(outputs(model, held), reference) for name, (model, _) in tries.items()}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] == math.inf:
        raise ConvpareError("the networks' outputs are not finite: do the weights contain NaN or infinite values?")
    return Recovered(tries[best][0], best, errors, len(held) + len(fit), tries[best][1])


def _images_for(
    teacher: nn.Module, plan: Plan, data: Data | ImageSet | Tensor, options: RecoverOptions
) -> tuple[Tensor, Tensor]:
    """Images to compare on and images to fit to, as the teacher takes them."""
    if len(plan.inputs) != 1:
        raise ConvpareError(
            f"{plan.model} takes {len(plan.inputs)} inputs; recovery can feed images only to a network with one"
        )
    images = calibration_images(data, options.images, options.seed)
    if images is None or len(images) < LEAST:
        given = 0 if images is None else len(images)
        raise ConvpareError(f"recovery needs at least {LEAST} calibration images, {given} given")
    aside = max(2, len(images) // 10)
    images = suited(images, teacher)
    return images[:aside], images[aside:]


def _recalibrated(small: nn.Module, fit: Tensor) -> nn.Module:
    if not norms_of(small):
        raise ConvpareError("this network has no batch norm to recalibrate; choose least-squares")
    model = copy.deepcopy(small)
    recalibrate_(model, torch.tensor_split(fit, math.ceil(len(fit) / 128)))  # of about one size: none has one image
    return model


def _least_squares(
    small: nn.Module, teacher: nn.Module, plan: Plan, fit: Tensor, options: RecoverOptions,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[nn.Module, Fitted]:  # fmt: skip
    teacher = merged_for(teacher, plan)
    graph = graph_for(teacher, plan)
    if plan.form == "graph":  # operator by operator as the student is
        teacher = removed(teacher, graph, graph.keep_all())
    student = copy.deepcopy(small)
    done = compensate_(
        student, teacher, graph, plan.keep(graph), fit, options.least_squares, on_progress, plan.factorizations
    )
    return student, done


def outputs(model: nn.Module, images: Tensor, batch_size: int = 128) -> Tensor:
    """The first tensor that `model` returns for images (n, …), in evaluation mode, without gradients."""
    with eval_mode(model), torch.no_grad():
        return torch.cat([first_tensor(model(batch)) for batch in torch.split(images, batch_size)])


def _error(got: Tensor, reference: Tensor) -> float:
    error = (got - reference).double().square().sum()
    spread = (reference - reference.mean(0)).double().square().sum().clamp_min(1e-300)
    ratio = float(error / spread)
    return math.inf if math.isnan(ratio) else ratio
