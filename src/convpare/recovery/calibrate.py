"""Calibration: least squares or batch-norm recalibration, whichever brings the outputs nearer to the original's."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from convpare.apply import graph_for, merged_for, plan_of
from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.graph.surgery import removed
from convpare.notebook import html_table
from convpare.planning.plan import Plan
from convpare.planning.planner import calibration_images
from convpare.recovery.batch_norm import norms_of, recalibrate_
from convpare.recovery.least_squares import Fitted, LeastSquares, compensate_
from convpare.recovery.outputs import outputs, relative_error
from convpare.recovery.tuning import TUNINGS, Tuned, TuneOptions, tune
from convpare.redundancy.taps import suited

METHODS = ("calibrate", "least-squares", "batch-norm", "none", *TUNINGS)
LEAST = 4  # images: two to fit to, two to compare on


@dataclass(frozen=True)
class RecoverOptions:
    """How accuracy is won back.

    Attributes:
        method: "least-squares", "batch-norm", or "calibrate": both (and neither) are tried, and the one whose
            outputs are nearest to the original's on calibration images that were not fitted to is taken. "distill"
            and "finetune": the same, and then training, without labels and with them (`tune`).
        images: how many calibration images are used, a tenth of them (at least two) for that comparison.
        seed: of the choice of images.
        least_squares: see `LeastSquares`.
        tune: see `TuneOptions`.
    """

    method: str = "calibrate"
    images: int = 1024
    seed: int = 0
    least_squares: LeastSquares = field(default_factory=LeastSquares)
    tune: TuneOptions = field(default_factory=TuneOptions)

    @property
    def calibration(self) -> "RecoverOptions":
        """The same without training."""
        return replace(self, method="calibrate") if self.method in TUNINGS else self

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConvpareError(f"no recovery {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.images < LEAST:
            raise ConvpareError(f"recovery is to use {self.images} image(s); at least {LEAST} are needed")


@dataclass(frozen=True, eq=False)
class Recovered:
    """A recovered network, which calibration was taken, and the relative output error of each that was tried.

    The error is ‖outputs − original's‖² / ‖original's − their mean‖² on the images kept aside. `tuned`: what training
    made of it, if there was any; `model` is then the trained one.
    """

    model: nn.Module
    method: str
    errors: dict[str, float]
    images: int
    fitted: Fitted | None
    tuned: Tuned | None = None

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        rows = [(name, f"{error:.3g}") for name, error in self.errors.items()]
        title = f"recovery: {self.method}, from {self.images:,} images"
        trained = "" if self.tuned is None else self.tuned._repr_html_()
        return html_table(("tried", "relative output error"), rows, title) + trained


def recover(
    small: nn.Module,
    teacher: nn.Module,
    data: Data | ImageSet | Tensor,
    *,
    plan: Plan | None = None,
    options: RecoverOptions = RecoverOptions(),
    on_progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A copy of `small` whose weights are fitted to `teacher` on unlabelled images, without gradients if not asked for.

    Args:
        small: what `apply` made of `teacher`.
        data: images (n, …), an image set, or data whose training images are taken. Only "finetune"
            looks at labels.
        plan: the plan that made `small`, where it does not carry it (a module built by hand).
        on_progress: called with (layers fitted, layers in all), then with steps of training.

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
    if options.method in TUNINGS:
        found = recover_with(small, teacher, data, plan=plan, options=options.calibration, on_progress=on_progress)
        return tuned(found, teacher, data, options, on_progress=on_progress)
    held, fit = _images_for(teacher, plan, data, options)
    tries: dict[str, tuple[nn.Module, Fitted | None]] = {}
    if options.method in ("none", "calibrate"):
        tries["none"] = (copy.deepcopy(small), None)
    if options.method == "batch-norm" or (options.method == "calibrate" and norms_of(small)):
        tries["batch-norm"] = (_recalibrated(small, fit), None)
    if options.method in ("least-squares", "calibrate"):
        tries["least-squares"] = _least_squares(small, teacher, plan, fit, options, on_progress)
    reference = outputs(teacher, held)
    errors = {name: relative_error(outputs(model, held), reference) for name, (model, _) in tries.items()}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] == math.inf:
        raise ConvpareError("the networks' outputs are not finite: do the weights contain NaN or infinite values?")
    return Recovered(tries[best][0], best, errors, len(held) + len(fit), tries[best][1])


def tuned(
    found: Recovered,
    teacher: nn.Module,
    data: Data | ImageSet | Tensor,
    options: RecoverOptions,
    *,
    checkpoint: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recovered:
    """The same after training, as `options.method` says. `checkpoint`: see `tune`."""
    done = tune(
        found.model, teacher, data, labels=options.method == "finetune", options=options.tune, seed=options.seed,
        checkpoint=checkpoint, on_step=on_progress,
    )  # fmt: skip
    return replace(found, model=done.model, tuned=done)


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
