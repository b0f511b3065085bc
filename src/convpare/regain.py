"""Recovery of a network that is there: how far it was from the original, and how far it is afterwards."""

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from convpare.compress import CompressOptions, Progress, Stage, Tester, html_stages, recovery_json
from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.planning.plan import Plan
from convpare.recovery import TUNINGS, Recovered, recover_with, tuned


@dataclass(frozen=True, eq=False)
class Regained:
    """A network that was recovered.

    Attributes:
        model: the result.
        stages: accuracy of the original, of what was given, after calibration and after training.
        recovered: how it was won back.
        test_images: how many images the accuracies are of.
    """

    model: nn.Module
    stages: tuple[Stage, ...]
    recovered: Recovered
    test_images: int

    def to_json(self) -> dict[str, Any]:
        stages = [stage.to_json() for stage in self.stages]
        return {"stages": stages, "recovery": recovery_json(self.recovered), "test_images": self.test_images}

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return html_stages(self.stages) + self.recovered._repr_html_()


def regain(
    small: nn.Module,
    teacher: nn.Module,
    data: Data | ImageSet,
    plan: Plan,
    options: CompressOptions,
    on_progress: Progress | None = None,
) -> Regained:
    """Recover a copy of `small` towards `teacher`, of which it was made. Neither is changed.

    Args:
        data: training images to recover with; its test images serve for the accuracies alone.
        plan: which made `small` of `teacher`.
        options: of the recovery and of the test images; the rest does not matter.

    Raises:
        ConvpareError: no recovery is asked for, or as `recover`.
    """
    if options.recover is None or options.recover.method == "none":
        raise ConvpareError("there is nothing to do: ask for a recovery")
    tell = on_progress or (lambda *_: None)
    tester = Tester(data, options.test_limit, tell)
    stages = [tester.stage("original", teacher, 0.0), tester.stage("given", small, 0.0)]
    started = time.perf_counter()
    found = recover_with(
        small, teacher, data, plan=plan, options=options.recover.calibration,
        on_progress=lambda done, total: tell("recovery", done, total),
    )  # fmt: skip
    stages.append(tester.stage(found.method, found.model, time.perf_counter() - started))
    if options.recover.method in TUNINGS:
        found = tuned(
            found, teacher, data, options.recover, checkpoint=options.checkpoint,
            on_progress=lambda done, total: tell("training", done, total),
        )  # fmt: skip
        assert found.tuned is not None
        stages.append(tester.stage("training", found.model, found.tuned.seconds))
    return Regained(found.model, tuple(stages), found, tester.images)
