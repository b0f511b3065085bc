"""From a criterion and a budget to a plan."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.graph.capture import Inputs
from convpare.graph.structure import Graph, Group
from convpare.graph.surgery import zeroed
from convpare.graph.trace import trace
from convpare.importance import Context, Criterion, Ranking, get_criterion
from convpare.planning.cost import total_cost
from convpare.planning.plan import Plan, RemoveChannels
from convpare.planning.solver import (
    Allocation,
    Budget,
    CostModel,
    allocate,
    allowed_levels,
    check_feasible,
    even_errors,
    limits_of,
)

SCOPES = ("auto", "inner", "all")
ALLOCATIONS = ("uniform", "global")


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made.

    Attributes:
        scope: "inner": channels that one layer alone makes (residual streams keep their width), "all", or "auto": inner
            if the budgets can be met so, else all. What was taken stands in the plan.
        allocation: "uniform" (every group loses about the same share), "global" (smallest error per saved cost first),
            or None for what suits the criterion.
        round_to: layers keep multiples of this many channels, or all.
        exclude: names of groups that stay whole.
        images: how many calibration images a criterion looks at.
        rounds: with more than one, channels go in so many equal steps, and similarities are measured anew before each.
        threshold: instead of budgets: remove what the criterion's error rates at or below it (QSFM-SSIM: 0.1 removes
            channels with SSIM ≥ 0.9).
        seed: of the choice of images.
        criterion_options: what the criterion itself takes, see e.g. `QSFMOptions`.
    """

    scope: str = "auto"
    allocation: str | None = None
    round_to: int = 1
    exclude: tuple[str, ...] = ()
    images: int = 128
    rounds: int = 1
    threshold: float | None = None
    seed: int = 0
    criterion_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConvpareError(f"no scope {self.scope!r}; choose one of {', '.join(SCOPES)}")
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            raise ConvpareError(f"no allocation {self.allocation!r}; choose one of {', '.join(ALLOCATIONS)}")
        for name in ("round_to", "images", "rounds"):
            if getattr(self, name) < 1:
                raise ConvpareError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ConvpareError(f"threshold is {self.threshold}; expected a number of 0 or more")


def plan(
    model: nn.Module,
    example_inputs: Inputs,
    data: Data | ImageSet | Tensor | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    criterion: str = "qsfm-ssim",
    options: PlanOptions = PlanOptions(),
    graph: Graph | None = None,
) -> Plan:
    """Choose which channels of `model` to remove. Nothing is changed.

    Args:
        example_inputs: as for `trace`; costs are those of these inputs.
        data: calibration images (n, …), an image set, or data whose training images are taken. Labels are never used.
        macs: budget as a fraction of the dense MACs.
        params: budget as a fraction of the dense parameters.
        criterion: a name in `convpare.importance.criteria()`.
        graph: the trace of `model`, if it is at hand.

    Raises:
        ConvpareError: no budget, one out of range or of reach, no such criterion, or no images where it needs some.
    """
    chosen = get_criterion(criterion)
    budget = Budget(macs, params)
    if bool(budget.fractions) == (options.threshold is not None):
        raise ConvpareError("give either a budget (macs, params) or a threshold: macs=0.5 for half of the MACs")
    graph = trace(model, example_inputs) if graph is None else graph
    images = _images_for(chosen, graph, data, options)
    options = replace(options, scope=_resolve_scope(graph, budget, options))
    return _Planner(model, graph, chosen, images, budget, options).plan()


def calibration_images(data: Data | ImageSet | Tensor | None, limit: int, seed: int) -> Tensor | None:
    """At most `limit` unlabelled images (n, …) of the training split, drawn by `seed`."""
    if data is None:
        return None
    if isinstance(data, Tensor):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        images = data[order[:limit].to(data.device)]
    elif isinstance(data, Data | ImageSet):
        images = (data.train if isinstance(data, Data) else data).tensor(limit=limit, seed=seed)
    else:
        raise ConvpareError(f"data is a {type(data).__name__}; expected images (n, …), an image set, or what load_data gives")
    if not torch.isfinite(images).all():
        raise ConvpareError("the calibration images contain NaN or infinite values")
    return images


def _images_for(
    chosen: Criterion, graph: Graph, data: Data | ImageSet | Tensor | None, options: PlanOptions
) -> Tensor | None:
    if not chosen.needs_images:
        return None
    images = calibration_images(data, options.images, options.seed)
    if images is None or not len(images):
        raise ConvpareError(f"criterion {chosen.name} looks at feature maps and needs images: give data, or take l2")
    if len(graph.inputs) != 1:
        raise ConvpareError(
            f"{graph.model} takes {len(graph.inputs)} inputs, but criterion {chosen.name} can feed images only to a "
            "network with one; take l2"
        )
    return images


def _resolve_scope(graph: Graph, budget: Budget, options: PlanOptions) -> str:
    """What "auto" stands for: inner channels, if the budgets can be met with them alone."""
    if options.scope != "auto":
        return options.scope
    cost = CostModel(graph)
    least = cost.cost(np.array([allowed[-1] for allowed in _levels(graph, replace(options, scope="inner"))], float))
    return "inner" if all(least[m] <= limit for m, limit in limits_of(cost, graph, budget).items()) else "all"


def _movable(graph: Graph, options: PlanOptions) -> list[Group]:
    """The groups that may lose channels."""
    return [
        g for g in graph.groups if g.name not in options.exclude and (options.scope == "all" or graph.is_inner(g))
    ]


def _levels(graph: Graph, options: PlanOptions) -> list[np.ndarray]:
    """Counts that each group may keep, from all down."""
    movable = {g.name for g in _movable(graph, options)}
    levels = allowed_levels(graph, options.round_to)
    return [allowed if g.name in movable else allowed[:1] for g, allowed in zip(graph.groups, levels, strict=True)]


@dataclass(frozen=True)
class _Planner:
    """Everything that a plan is made of. Scope "auto" is resolved."""

    model: nn.Module
    graph: Graph
    criterion: Criterion
    images: Tensor | None
    budget: Budget
    options: PlanOptions

    def __post_init__(self) -> None:
        if not self.graph.groups:
            raise ConvpareError(
                f"nothing in {self.graph.model} can be removed; inspect says why every channel stays"
            )
        for name in self.options.exclude:
            self.graph.group(name)

    def plan(self) -> Plan:
        keep, errors = self._choose()
        return Plan(
            model=self.graph.model,
            inputs=self.graph.inputs,
            criterion=self.criterion.name,
            options=self._recorded(),
            requested=self.budget.fractions,
            before=total_cost(self.graph, self.graph.keep_all()),
            after=total_cost(self.graph, keep),
            edits=tuple(_edit(g, keep, errors) for g in self.graph.groups if not keep[g.units].all()),
        )

    @property
    def allocation(self) -> str:
        return self.options.allocation or self.criterion.allocation

    def _recorded(self) -> dict[str, Any]:
        recorded = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        given = dict(self.options.criterion_options)
        return recorded | {
            "allocation": self.allocation, "exclude": list(self.options.exclude), "criterion_options": given
        }  # fmt: skip

    def _choose(self) -> tuple[np.ndarray, np.ndarray]:
        """The mask of channels that stay (channels,), and the error that each of the others adds (channels,)."""
        keep, errors = self.graph.keep_all(), np.zeros(self.graph.channels)
        for number in range(1, self.options.rounds + 1):
            rankings = self._rank(keep)
            part = number / self.options.rounds
            fewer = self._by_budget(rankings, part) if self.budget.fractions else self._by_threshold(rankings, part)
            for group in self.graph.groups:
                if group.name in rankings:
                    ranking = rankings[group.name]
                    added = np.zeros(group.channels)
                    added[ranking.order] = ranking.errors
                    newly = keep[group.units] & ~fewer[group.units]
                    errors[group.units][newly] = added[newly]
            keep = fewer
        return keep, errors

    def _rank(self, alive: np.ndarray) -> dict[str, Ranking]:
        """Rank what may go; in later rounds on the network with the channels that are gone set to zero."""
        current = self.model if alive.all() else zeroed(self.model, self.graph, alive)
        groups = tuple(_movable(self.graph, self.options))
        given = dict(self.options.criterion_options)
        rankings = self.criterion.rank(Context(current, self.graph, alive, self.images, given, groups))
        return {g.name: _checked(rankings.get(g.name), g, self.criterion.name) for g in groups}

    def _by_budget(self, rankings: Mapping[str, Ranking], part: float) -> np.ndarray:
        """The mask of channels that stay when this part of the way to the budget is gone."""
        step = Budget(**{m: 1 - part * (1 - fraction) for m, fraction in self.budget.fractions.items()})
        cost = CostModel(self.graph)
        levels = _levels(self.graph, self.options)
        if self.allocation == "uniform":
            errors = even_errors(cost, levels, step.fractions)
        else:
            errors = [_curve(rankings.get(g.name))[allowed[0] - allowed]
                      for g, allowed in zip(self.graph.groups, levels, strict=True)]  # fmt: skip
        allocation = Allocation(cost, levels, errors, limits_of(cost, self.graph, step))
        check_feasible(allocation, step, cost.cost(np.array([g.channels for g in self.graph.groups], float)))
        allocate(allocation)
        return self._mask(rankings, dict(zip(rankings_names(self.graph), allocation.kept.astype(int), strict=True)))

