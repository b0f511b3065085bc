"""How a plan is made: what the user can choose."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from convpare.errors import ConvpareError
from convpare.importance import get_criterion
from convpare.planning.layer_times import Target
from convpare.planning.solver import Budget

METHODS = ("prune", "factorize")
COMPARABLE = ("reconstruction", "sensitivity")  # criteria whose errors compare with those of chains
SCOPES = ("auto", "inner", "all")
ALLOCATIONS = ("uniform", "global")


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made.

    Attributes:
        methods: "prune" (remove channels), "factorize" (replace layers by chains of two), or both: each layer gets what
            costs least error. With "factorize" the criterion must be one of `COMPARABLE`.
        scope: "inner": channels that one layer alone makes (residual streams keep their width), "all", or "auto": inner
            if the budgets can be met so, else all. What was taken stands in the plan.
        allocation: "uniform" (every group loses about the same share), "global" (smallest error per saved cost first),
            or None for what suits the criterion.
        round_to: layers keep multiples of this many channels, or all.
        exclude: names of groups that stay whole; with "factorize" of layers, too, that stay as they are.
        inexact: take groups, too, whose removal by nature changes the others (a layer norm averages over them).
        merge: first let layers take in the expansions before them, where nothing nonlinear stands between: exact.
        images: how many calibration images a criterion looks at.
        rounds: with more than one, channels go in so many equal steps, and similarities are measured anew before each.
        threshold: instead of budgets: remove what the criterion's error rates at or below it (QSFM-SSIM: 0.1 removes
            channels with SSIM ≥ 0.9).
        seed: of the choice of images.
        latency: a budget beside the others, as a fraction of the network's time on the target.
        memory: likewise, of the most bytes of tensors alive at a time (see `convpare.graph.memory`).
        target: where the network is to run.
        criterion_options: what the criterion itself takes, see e.g. `QSFMOptions`.
    """

    methods: tuple[str, ...] = ("prune",)
    scope: str = "auto"
    allocation: str | None = None
    round_to: int = 1
    exclude: tuple[str, ...] = ()
    inexact: bool = False
    merge: bool = False
    images: int = 128
    rounds: int = 1
    threshold: float | None = None
    seed: int = 0
    latency: float | None = None
    memory: float | None = None
    target: Target = field(default_factory=Target)
    criterion_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods or not set(self.methods) <= set(METHODS) or len(set(self.methods)) < len(self.methods):
            raise ConvpareError(f"methods are {self.methods}; expected prune, factorize, or both")
        if "factorize" in self.methods and (self.threshold is not None or self.rounds > 1):
            raise ConvpareError("factorization is planned for budgets, in one round; give no threshold and no rounds")
        if self.scope not in SCOPES:
            raise ConvpareError(f"no scope {self.scope!r}; choose one of {', '.join(SCOPES)}")
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise ConvpareError(f"no allocation {self.allocation!r}; choose one of {', '.join(ALLOCATIONS)}")
        for name in ("round_to", "images", "rounds"):
            if getattr(self, name) < 1:
                raise ConvpareError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ConvpareError(f"threshold is {self.threshold}; expected a number of 0 or more")

    def budget(self, macs: float | None, params: float | None) -> Budget:
        """The budget. Raises ConvpareError where there is a threshold, too, or neither."""
        budget = Budget(macs, params, self.latency, self.memory)
        if bool(budget.fractions) == (self.threshold is not None):
            raise ConvpareError(
                "give either a budget (macs, params, latency, memory) or a threshold: macs=0.5 for half of the MACs"
            )
        return budget

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "methods": list(self.methods),
            "exclude": list(self.exclude),
            "target": asdict(self.target),
            "criterion_options": dict(self.criterion_options),
        }


def check_methods(options: PlanOptions, criterion: str) -> None:
    """Raise unless a plan with these options can factorize layers, where it is to."""
    if "factorize" not in options.methods:
        return
    allocation = options.allocation or get_criterion(criterion).allocation
    if criterion not in COMPARABLE or allocation != "global":
        raise ConvpareError(
            f"criterion {criterion} ({allocation}) does not say what compares with factorizations; take "
            f"{' or '.join(COMPARABLE)} and the global allocation"
        )
