"""From a criterion and a budget to a plan."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError, Infeasible
from convpare.factorize.edit import Factorize
from convpare.graph.capture import Inputs
from convpare.graph.merging import merge_all
from convpare.graph.probe import FOLLOWS_NOT
from convpare.graph.structure import Form, Graph, Group, Layer
from convpare.graph.surgery import zeroed
from convpare.graph.trace import BEYOND, trace
from convpare.importance import Context, Criterion, Ranking, get_criterion
from convpare.planning.cost import count, planned_cost, total_cost
from convpare.planning.mixed import Choices, MixedModel, keep_of
from convpare.planning.options import chains_of, factorizable, metrics_of
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

METHODS = ("prune", "factorize")
COMPARABLE = ("reconstruction", "sensitivity")  # criteria whose errors compare with those of chains
REMOVAL = 2.5
"""How many times as much an error predicted of removals counts as one of chains, where both are chosen together.

Measured once, in a trial with centred second moments: per unit of predicted error ResNet-56 (CIFAR-10, 0.52 of the
MACs, 0.42 of the parameters) had after calibration 0.037 of relative output error from removals alone, 0.015 from
chains alone.
"""
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
        graph: the trace of `model`, if it is at hand; with merges, that of the merged model.

    Raises:
        ConvpareError: no budget, one out of range or of reach, no such criterion, or no images where it needs some.
    """
    chosen = get_criterion(criterion)
    budget = Budget(macs, params)
    if bool(budget.fractions) == (options.threshold is not None):
        raise ConvpareError("give either a budget (macs, params) or a threshold: macs=0.5 for half of the MACs")
    if options.merge:
        return _merged_plan(model, example_inputs, data, budget, criterion, options, graph)
    graph = trace(model, example_inputs) if graph is None else graph
    check_methods(options, criterion, graph.form)
    if not graph.groups and "factorize" not in options.methods:
        reason = "inspect says why every channel stays"
        raise Infeasible(f"nothing in {graph.model} can be removed; {reason}{_hint(graph, options)}")
    for name in options.exclude:
        if "factorize" not in options.methods or all(layer.name != name for layer in graph.layers):
            graph.group(name)
    images = _images_for(chosen, graph, data, options) if chosen.needs_images else None
    settled = replace(
        options, scope=_resolve_scope(graph, budget, options), allocation=options.allocation or chosen.allocation
    )
    factorizations: tuple[Factorize, ...] = ()
    told = _recorded(settled)
    if "factorize" in options.methods:
        keep, errors, factorizations, told["gap"] = _choose_mixed(model, graph, chosen, images, budget, settled)
    else:
        keep, errors = _choose(model, graph, chosen, images, budget, settled)
    return Plan(
        model=graph.model,
        inputs=graph.inputs,
        criterion=criterion,
        options=told,
        requested=budget.fractions,
        before=total_cost(graph, graph.keep_all()),
        after=planned_cost(graph, keep, factorizations),
        factorizations=factorizations,
        edits=tuple(_edit(g, keep, errors) for g in graph.groups if not keep[g.units].all()),
        form=graph.form,
    )


def _merged_plan(
    model: nn.Module,
    example_inputs: Inputs,
    data: Data | ImageSet | Tensor | None,
    budget: Budget,
    criterion: str,
    options: PlanOptions,
    graph: Graph | None,
) -> Plan:
    """A plan of the merged model under the budget of the model as it was."""
    small, merges = merge_all(model, example_inputs)
    before, left = count(model, example_inputs).total, count(small, example_inputs).total
    rest = {
        metric: min(fraction * getattr(before, metric) / max(getattr(left, metric), 1), 1.0)
        for metric, fraction in budget.fractions.items()
    }
    made = plan(small, example_inputs, data, **rest, criterion=criterion, options=replace(options, merge=False),
                graph=graph)  # fmt: skip
    return replace(
        made, before=before, requested=budget.fractions, options={**made.options, "merge": True}, merges=merges
    )


def check_methods(options: PlanOptions, criterion: str, form: Form) -> None:
    """Raise unless a plan with these options can factorize layers, where it is to."""
    if "factorize" not in options.methods:
        return
    allocation = options.allocation or get_criterion(criterion).allocation
    if criterion not in COMPARABLE or allocation != "global":
        raise ConvpareError(
            f"criterion {criterion} ({allocation}) does not say what compares with factorizations; take "
            f"{' or '.join(COMPARABLE)} and the global allocation"
        )
    if form == "graph":
        raise ConvpareError("layers are factorized in the module form; take another form than graph, or prune alone")


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
        raise ConvpareError(f"data is a {type(data).__name__}; expected images (n, …), an image set or data")
    if not torch.isfinite(images).all():
        raise ConvpareError("the calibration images contain NaN or infinite values")
    return images


def _images_for(chosen: Criterion, graph: Graph, data: Data | ImageSet | Tensor | None, options: PlanOptions) -> Tensor:
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


def _movable(graph: Graph, options: PlanOptions) -> tuple[Group, ...]:
    """The groups that may lose channels."""
    inner = options.scope == "inner"
    return tuple(
        g
        for g in graph.groups
        if g.name not in options.exclude and (options.inexact or g.inexact is None) and (graph.is_inner(g) or not inner)
    )


def _levels(graph: Graph, options: PlanOptions) -> list[np.ndarray]:
    """Counts that each group may keep, from all down."""
    movable = {g.name for g in _movable(graph, options)}
    levels = allowed_levels(graph, options.round_to)
    return [allowed if g.name in movable else allowed[:1] for g, allowed in zip(graph.groups, levels, strict=True)]


def _choose(
    model: nn.Module, graph: Graph, chosen: Criterion, images: Tensor | None, budget: Budget, options: PlanOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The mask of channels that stay (channels,), and the error that each of the others adds (channels,)."""
    keep, errors = graph.keep_all(), np.zeros(graph.channels)
    for number in range(1, options.rounds + 1):
        rankings = _rank(model, graph, chosen, images, keep, options)
        part = number / options.rounds
        if options.threshold is not None:
            counts = _counts_by_threshold(graph, rankings, part * options.threshold, options)
        else:
            step = Budget(**{m: 1 - part * (1 - fraction) for m, fraction in budget.fractions.items()})
            counts = _counts_by_budget(graph, rankings, step, options)
        fewer = graph.keep_all()
        for group, kept in zip(graph.groups, counts, strict=True):
            if kept < group.channels:
                ranking = rankings[group.name]
                gone = group.start + ranking.order[: group.channels - kept]
                newly = keep[gone]
                errors[gone[newly]] = ranking.errors[: len(gone)][newly]
                fewer[gone] = False
        keep = fewer
    return keep, errors


def _choose_mixed(
    model: nn.Module, graph: Graph, chosen: Criterion, images: Tensor | None, budget: Budget, options: PlanOptions
) -> tuple[np.ndarray, np.ndarray, tuple[Factorize, ...], float]:
    """The mask of channels that stay, the error that each of the others adds (channels,), what becomes chains, and how
    far from the best choice of chains that may be.

    All is chosen together, with the errors of chains of whole layers; then the chains once more, of what is left of
    the layers.
    """
    assert images is not None, "criteria whose errors compare with those of chains look at images"
    levels = _levels(graph, options)
    rankings = _rank(model, graph, chosen, images, graph.keep_all(), options) if "prune" in options.methods else {}
    levels = levels if rankings else [allowed[:1] for allowed in levels]
    curves = [np.zeros(1) if len(allowed) == 1 else REMOVAL * _curve(rankings[g.name])[allowed[0] - allowed]
              for g, allowed in zip(graph.groups, levels, strict=True)]  # fmt: skip
    layers = [layer for layer in factorizable(model, graph) if layer.name not in options.exclude]
    known = metrics_of(model, layers, images, chosen.name == "sensitivity")
    layers = [layer for layer in layers if layer.name in known]
    weights = dict(model.named_parameters(remove_duplicate=False))

    def choices(keep: np.ndarray) -> list[Choices]:
        relative = chosen.name == "reconstruction"
        return [
            Choices(x, tuple(chains_of(graph, x, weights[x.weight], known[x.name], keep, relative))) for x in layers
        ]

    keep, dense = graph.keep_all(), CostModel(graph)
    limits = limits_of(dense, graph, budget)
    offered = choices(keep)
    model_cost = MixedModel(graph, offered)
    own = [np.array([0.0, *(chain.error for chain in c.chains)]) for c in offered]
    allocation = Allocation(model_cost, [*levels, *model_cost.levels], [*curves, *own], limits)
    counts = np.array([g.channels for g in graph.groups], float)
    check_feasible(allocation, budget, dense.cost(counts), _hint(graph, options))
    if rankings:
        allocate(allocation, exchange=False)
        counts = allocation.kept[: len(graph.groups)]
        keep = keep_of(graph, {name: ranking.order for name, ranking in rankings.items()}, counts)
        model_cost = MixedModel(graph, choices(keep))
    found, gap = model_cost.best_chains(counts, limits)
    errors = np.zeros(graph.channels)
    for group in graph.groups:
        if group.name in rankings:
            errors[group.start + rankings[group.name].order] = rankings[group.name].errors
    edits = [
        Factorize(x.name, chain.form, (chain.rank,), _shape(graph, x, keep), chain.error)
        for x, chain in zip(layers, found, strict=True)
        if chain is not None
    ]
    return keep, errors, tuple(edits), gap


def _shape(graph: Graph, layer: Layer, keep: np.ndarray) -> tuple[int, ...]:
    return tuple(len(graph.kept((layer.weight, axis), keep)) for axis in range(len(graph.shapes[layer.weight])))


def _rank(
    model: nn.Module, graph: Graph, chosen: Criterion, images: Tensor | None, alive: np.ndarray, options: PlanOptions
) -> dict[str, Ranking]:
    """Rank what may go; in later rounds on the network with the channels that are gone set to zero."""
    current = model if alive.all() else zeroed(model, graph, alive)
    groups = _movable(graph, options)
    rankings = chosen.rank(Context(current, graph, alive, images, dict(options.criterion_options), groups))
    for group in groups:
        _check_ranking(rankings.get(group.name), group, chosen.name)
    return rankings


def _check_ranking(ranking: Ranking | None, group: Group, criterion: str) -> None:
    if ranking is None or sorted(ranking.order.tolist()) != list(range(group.channels)):
        raise ConvpareError(f"criterion {criterion} does not rank the {group.channels} channels of {group.name!r}")
    if ranking.errors.shape != (group.channels,) or not (np.isfinite(ranking.errors) & (ranking.errors >= 0)).all():
        raise ConvpareError(
            f"criterion {criterion} gives group {group.name!r} errors that are not all finite numbers of 0 or more, "
            "one a channel: do the weights contain NaN?"
        )


def _counts_by_budget(graph: Graph, rankings: Mapping[str, Ranking], budget: Budget, options: PlanOptions) -> list[int]:
    """How many channels each group keeps, so that the budget is met."""
    cost = CostModel(graph)
    levels = _levels(graph, options)
    if options.allocation == "uniform":
        errors = even_errors(cost, levels, budget.fractions)
    else:
        errors = [np.zeros(1) if len(allowed) == 1 else _curve(rankings[g.name])[allowed[0] - allowed]
                  for g, allowed in zip(graph.groups, levels, strict=True)]  # fmt: skip
    dense = cost.cost(np.array([g.channels for g in graph.groups], float))
    allocation = Allocation(cost, levels, errors, limits_of(cost, graph, budget))
    check_feasible(allocation, budget, dense, _hint(graph, options))
    allocate(allocation)
    return [int(count) for count in allocation.kept]


def _hint(graph: Graph, options: PlanOptions) -> str:
    """What else could be tried."""
    hints = []
    if options.scope == "inner":
        hints.append("scope all takes residual streams, too")
    if not options.inexact and any(g.inexact for g in graph.groups):
        hints.append("marked groups stay whole without inexact (--inexact)")
    if graph.form != "graph" and any(FOLLOWS_NOT in f.reason for f in graph.frozen):
        hints.append("the graph form (--form graph) follows numbers that the module's forward writes out")
    if graph.form == "module" and any(BEYOND in f.reason for f in graph.frozen):
        hints.append("the linked form (--form linked) takes channels that captured parts hand to each other")
    return "".join(f"; {hint}" for hint in hints)


def _curve(ranking: Ranking) -> np.ndarray:
    """The error of removing the first 0, 1, 2, … channels of a ranking."""
    return np.concatenate([[0.0], np.cumsum(ranking.errors)])


def _counts_by_threshold(
    graph: Graph, rankings: Mapping[str, Ranking], threshold: float, options: PlanOptions
) -> list[int]:
    """How many channels each group keeps, when those go whose errors, from the first on, are at most `threshold`."""
    counts = []
    for group, allowed in zip(graph.groups, _levels(graph, options), strict=True):
        beyond = np.flatnonzero(rankings[group.name].errors > threshold) if len(allowed) > 1 else np.zeros(1)
        wanted = group.channels - int(beyond[0]) if len(beyond) else 1
        counts.append(int(allowed[allowed >= wanted].min()))
    return counts


def _edit(group: Group, keep: np.ndarray, errors: np.ndarray) -> RemoveChannels:
    mine = keep[group.units]
    kept = tuple(np.flatnonzero(mine).tolist())
    return RemoveChannels(group.name, kept, group.channels, float(errors[group.units][~mine].sum()))


def _recorded(options: PlanOptions) -> dict[str, Any]:
    recorded = {f.name: getattr(options, f.name) for f in fields(options)}
    return recorded | {
        "methods": list(options.methods),
        "exclude": list(options.exclude),
        "criterion_options": dict(options.criterion_options),
    }
