"""From a criterion and a budget to a plan."""

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
    copies,
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
        allocation: "uniform" (every group loses about the same share), "global" (smallest error per saved cost first), or None for what suits the criterion.
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
        ConvpareError: no budget, a budget out of range or out of reach, no such criterion, or no images where it needs some.
    """
    chosen = get_criterion(criterion)
    budget = Budget(macs, params)
    if bool(budget.fractions) == (options.threshold is not None):
        raise ConvpareError("give a budget (macs, params) or a threshold, one of the two: macs=0.5 for half of the MACs")
    graph = trace(model, example_inputs) if graph is None else graph
    if not graph.groups:
        raise ConvpareError(f"nothing in {graph.model} can be removed; inspect says why every channel stays")
    for name in options.exclude:
        graph.group(name)
    images = calibration_images(data, options.images, options.seed) if chosen.needs_images else None
    if chosen.needs_images and images is None:
        raise ConvpareError(f"criterion {criterion} looks at feature maps and needs images: give data, or take l2")
    scope = _resolve_scope(graph, budget, options)
    keep, errors = _choose(model, graph, chosen, images, budget, replace(options, scope=scope))
    return Plan(
        model=graph.model,
        inputs=graph.inputs,
        criterion=criterion,
        options={**_recorded(options, chosen), "scope": scope},
        requested=budget.fractions,
        before=total_cost(graph, graph.keep_all()),
        after=total_cost(graph, keep),
        edits=tuple(_edit(g, keep, errors) for g in graph.groups if not keep[g.units].all()),
    )


def calibration_images(data: Data | ImageSet | Tensor | None, limit: int, seed: int) -> Tensor | None:
    """At most `limit` unlabelled images (n, …) of the training split, drawn by `seed`."""
    if data is None:
        return None
    if isinstance(data, Tensor):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        return data[order[:limit]]
    images = data.train if isinstance(data, Data) else data
    return images.tensor(limit=limit, seed=seed)


def _resolve_scope(graph: Graph, budget: Budget, options: PlanOptions) -> str:
    """What "auto" stands for: inner channels, if the budgets can be met with them alone."""
    if options.scope != "auto":
        return options.scope
    cost = CostModel(graph)
    movable = _movable(graph, replace(options, scope="inner"))
    least = cost.cost(np.array([1 if g.name in movable else g.channels for g in graph.groups], float))
    return "inner" if all(least[m] <= limit for m, limit in limits_of(cost, graph, budget).items()) else "all"


def _movable(graph: Graph, options: PlanOptions) -> set[str]:
    return {
        g.name for g in graph.groups
        if g.name not in options.exclude and (options.scope == "all" or graph.is_inner(g))
    }  # fmt: skip


def _choose(
    model: nn.Module, graph: Graph, chosen: Criterion, images: Tensor | None, budget: Budget, options: PlanOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The mask of channels that stay (channels,), and the error that each of the others adds (channels,)."""
    movable = _movable(graph, options)
    keep, errors = graph.keep_all(), np.zeros(graph.channels)
    for number in range(1, options.rounds + 1):
        rankings = _rank(model, graph, chosen, images, keep, options)
        part = number / options.rounds
        step = Budget(**{m: 1 - part * (1 - fraction) for m, fraction in budget.fractions.items()})
        if options.threshold is not None:
            fewer = _by_threshold(graph, rankings, movable, part * options.threshold)
        else:
            fewer = _by_budget(graph, rankings, movable, step, options, options.allocation or chosen.allocation)
        for group in graph.groups:
            ranking = rankings[group.name]
            added = np.zeros(group.channels)
            added[ranking.order] = ranking.errors
            newly = keep[group.units] & ~fewer[group.units]
            errors[group.units][newly] = added[newly]
        keep = fewer
    return keep, errors


def _rank(
    model: nn.Module, graph: Graph, chosen: Criterion, images: Tensor | None, alive: np.ndarray, options: PlanOptions
) -> dict[str, Ranking]:
    """Rank all groups; in later rounds on the network with the channels that are gone set to zero."""
    current = model if alive.all() else zeroed(model, graph, alive)
    given = dict(options.criterion_options)
    return chosen.rank(Context(current, graph, alive, images, given))


def _by_budget(
    graph: Graph, rankings: Mapping[str, Ranking], movable: set[str], budget: Budget, options: PlanOptions, how: str
) -> np.ndarray:
    cost = CostModel(graph)
    levels = allowed_levels(graph, options.round_to, copies(graph))
    levels = [l if g.name in movable else l[:1] for g, l in zip(graph.groups, levels, strict=True)]
    if how == "uniform":
        errors = even_errors(cost, levels, budget.fractions)
    else:
        curves = [np.concatenate([[0.0], np.cumsum(rankings[g.name].errors)]) for g in graph.groups]
        errors = [c[allowed[0] - allowed] for c, allowed in zip(curves, levels, strict=True)]
    dense = cost.cost(np.array([g.channels for g in graph.groups], float))
    allocation = Allocation(cost, levels, errors, limits_of(cost, graph, budget))
    check_feasible(allocation, budget, dense)
    allocate(allocation)
    keep = graph.keep_all()
    for group, count in zip(graph.groups, allocation.kept, strict=True):
        keep[group.start + rankings[group.name].order[: group.channels - int(count)]] = False
    return keep


def _by_threshold(graph: Graph, rankings: Mapping[str, Ranking], movable: set[str], threshold: float) -> np.ndarray:
    keep = graph.keep_all()
    for group in graph.groups:
        ranking = rankings[group.name]
        beyond = np.flatnonzero(ranking.errors > threshold)
        count = int(beyond[0]) if len(beyond) else group.channels
        if group.name in movable:
            keep[group.start + ranking.order[: min(count, group.channels - 1)]] = False
    return keep


def _edit(group: Group, keep: np.ndarray, errors: np.ndarray) -> RemoveChannels:
    mine = keep[group.units]
    kept = tuple(np.flatnonzero(mine).tolist())
    return RemoveChannels(group.name, kept, group.channels, float(errors[group.units][~mine].sum()))


def _recorded(options: PlanOptions, chosen: Criterion) -> dict[str, Any]:
    full = replace(options, allocation=options.allocation or chosen.allocation)
    recorded = asdict(full)
    recorded["exclude"] = list(options.exclude)
    recorded["criterion_options"] = dict(options.criterion_options)
    return recorded
