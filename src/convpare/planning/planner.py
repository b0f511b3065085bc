"""From a criterion and a budget to a plan."""

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError, Infeasible
from convpare.factorize.edit import Factorize, layout_in
from convpare.graph.capture import Inputs
from convpare.graph.merging import merge_all
from convpare.graph.probe import FOLLOWS_NOT
from convpare.graph.structure import Form, Graph, Group, Layer
from convpare.graph.trace import BEYOND, trace
from convpare.importance import Ranking, get_criterion
from convpare.planning.cost import count, planned_cost, total_cost
from convpare.planning.layer_times import Target
from convpare.planning.memory import (
    MemoryModel,
    between,
    caps,
    check_feasible_memory,
    memory_in,
    peak_memory,
)
from convpare.planning.mixed import Choices, MixedModel, keep_of
from convpare.planning.options import Chain
from convpare.planning.plan import Plan, RemoveChannels
from convpare.planning.settings import COMPARABLE, PlanOptions, check_methods
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
from convpare.planning.statistics import Statistics

REMOVAL = 2.5
"""How many times as much an error predicted of removals counts as one of chains, where both are chosen together.

Measured once, in a trial with centred second moments: per unit of predicted error ResNet-56 (CIFAR-10, 0.52 of the
MACs, 0.42 of the parameters) had after calibration 0.037 of relative output error from removals alone, 0.015 from
chains alone. ResNet-20 agrees (2.4 at half and at 0.35 of the MACs, criterion sensitivity).
"""

POINT = 0.01  # of the dense cost, that shadow prices are told of


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
    """Choose which channels of `model` to remove, and which layers become chains. Nothing is changed.

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
    budget = options.budget(macs, params)
    return Planner(model, example_inputs, data, criterion=criterion, options=options, graph=graph).plan(budget)


class Planner:
    """Makes plans of one network under any budgets, from what is measured once.

    Attributes:
        graph: of the network, with merges of the merged one.
        before: cost of the model as it was given.
        statistics: what is known of its channels and layers.

    Args:
        model: as for `plan`, like the others.
        form: of the trace, where no graph is given.

    Raises:
        ConvpareError: no such criterion, or no images where it needs some.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        data: Data | ImageSet | Tensor | None = None,
        *,
        criterion: str = "qsfm-ssim",
        options: PlanOptions = PlanOptions(),
        form: Form = "module",
        graph: Graph | None = None,
    ) -> None:
        chosen = get_criterion(criterion)
        whole, self._merges = merge_all(model, example_inputs) if options.merge else (model, ())
        self.graph = graph = trace(whole, example_inputs, form=form) if graph is None else graph
        check_methods(options, criterion)
        self._options = replace(options, allocation=options.allocation or chosen.allocation)
        self._left = total_cost(graph, graph.keep_all())
        self.before = count(model, example_inputs).total if self._merges else self._left
        self._example = model, example_inputs
        images = _images_for(criterion, graph, data, options) if chosen.needs_images else None
        self.statistics = Statistics(whole, graph, chosen, images, options.criterion_options, options.target)

    @property
    def target(self) -> Target:
        """Where the network is to run."""
        return self._options.target

    def plan(
        self, budget: Budget = Budget(), *, methods: tuple[str, ...] | None = None, exclude: tuple[str, ...] = ()
    ) -> Plan:
        """A plan under `budget` and the options' latency, or by their threshold. Latency is that predicted.

        Args:
            methods: in place of those of the options.
            exclude: beside those of the options.

        Raises:
            Infeasible: the budget is out of reach.
            ConvpareError: what is excluded is not there.
        """
        graph = self.graph
        budget = replace(
            budget,
            latency=self._options.latency if budget.latency is None else budget.latency,
            memory=self._options.memory if budget.memory is None else budget.memory,
        )
        options = replace(
            self._options, methods=methods or self._options.methods, exclude=(*self._options.exclude, *exclude)
        )
        if not graph.groups and "factorize" not in options.methods:
            reason = "inspect says why every channel stays"
            raise Infeasible(f"nothing in {graph.model} can be removed; {reason}{_hint(graph, options)}")
        layers = {layer.name for layer in graph.layers} if "factorize" in self._options.methods else set()
        for name in options.exclude:
            if name not in layers:
                graph.group(name)
        own = self._of_what_merges_left(budget)
        settled = replace(options, scope=_resolve_scope(self.statistics, own, options))
        chosen = (_choose_mixed if "factorize" in options.methods else _choose)(self.statistics, own, settled)
        return Plan(
            model=graph.model,
            inputs=graph.inputs,
            criterion=self.statistics.criterion.name,
            options={**settled.to_json(), **chosen.told, **self._timed(budget, chosen), **self._held(budget, chosen)},
            requested=budget.fractions,
            before=self.before,
            after=planned_cost(graph, chosen.keep, chosen.factorizations),
            merges=self._merges,
            factorizations=chosen.factorizations,
            edits=tuple(_edit(g, chosen.keep, chosen.errors) for g in graph.groups if not chosen.keep[g.units].all()),
            form=graph.form,
        )

    def prices(self, made: Plan) -> dict[str, float]:
        """The shadow price of each budget of a plan: the predicted error that one per cent of the dense cost more
        would take back. Found by planning with that much more; none of a plan in several rounds.
        """
        found: dict[str, float] = {}
        if self._options.rounds > 1:
            return found
        for metric, fraction in made.requested.items():
            more = min(fraction + POINT, 1.0)
            if more == fraction:
                found[metric] = 0.0
                continue
            looser = self.plan(
                Budget(**{**made.requested, metric: more}), methods=tuple(made.options["methods"]),
                exclude=tuple(made.options["exclude"]),
            )  # fmt: skip
            found[metric] = max(0.0, made.error - looser.error) * POINT / (more - fraction)
        return found

    def _timed(self, budget: Budget, chosen: "_Chosen") -> dict[str, list[float]]:
        """Milliseconds before, measured, and after, predicted; where there is a budget of them."""
        if budget.latency is None:
            return {}
        times = self.statistics.times
        times.times.save()
        return {"latency_ms": [times.whole, times.predicted(chosen.keep, chosen.factorizations)]}

    def _held(self, budget: Budget, chosen: "_Chosen") -> dict[str, list[int]]:
        """Bytes of tensors alive at the worst time before and after; where there is a budget of them."""
        if budget.memory is None:
            return {}
        return {"memory_bytes": [self._held_before, peak_memory(self.graph, chosen.keep, chosen.factorizations)]}

    @cached_property
    def _held_before(self) -> int:
        """Of the model as it was, before merges."""
        graph = trace(*self._example) if self._merges else self.graph
        return peak_memory(graph, graph.keep_all())

    def _of_what_merges_left(self, budget: Budget) -> Budget:
        """The budget of the model as it was as one of the merged model."""
        if not self._merges:
            return budget
        grown = {
            metric: min(fraction * getattr(self.before, metric) / max(getattr(self._left, metric), 1), 1.0)
            for metric, fraction in budget.fractions.items() if metric not in ("latency", "memory")
        }  # fmt: skip
        if budget.memory is not None:
            left = peak_memory(self.graph, self.graph.keep_all())
            grown["memory"] = min(budget.memory * self._held_before / max(left, 1), 1.0)
        return replace(budget, **grown)


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


def _images_for(criterion: str, graph: Graph, data: Data | ImageSet | Tensor | None, options: PlanOptions) -> Tensor:
    images = calibration_images(data, options.images, options.seed)
    if images is None or not len(images):
        raise ConvpareError(f"criterion {criterion} looks at feature maps and needs images: give data, or take l2")
    if len(graph.inputs) != 1:
        raise ConvpareError(
            f"{graph.model} takes {len(graph.inputs)} inputs, but criterion {criterion} can feed images only to a "
            "network with one; take l2"
        )
    return images


def _resolve_scope(statistics: Statistics, budget: Budget, options: PlanOptions) -> str:
    """What "auto" stands for: inner channels, if the budgets can be met with them alone."""
    if options.scope != "auto":
        return options.scope
    graph = statistics.graph
    cost = CostModel(graph, statistics.times if budget.latency is not None else None)
    fewest = np.array([allowed[-1] for allowed in _levels(graph, replace(options, scope="inner"))], float)
    least, fits = cost.cost(fewest), True
    if budget.memory is not None:
        fits = MemoryModel(memory_in(graph), graph.groups).peak(fewest) <= _memory_limit(graph, budget)
    fits &= all(least[m] <= limit for m, limit in limits_of(cost, graph, budget).items())
    return "inner" if fits else "all"


def _memory_limit(graph: Graph, budget: Budget) -> float:
    """In bytes, rounded down; without such a budget there is none."""
    if budget.memory is None:
        return math.inf
    return math.floor(budget.memory * peak_memory(graph, graph.keep_all()))


def _within_memory(
    graph: Graph, levels: Sequence[np.ndarray], errors: Sequence[np.ndarray], budget: Budget, hint: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The levels, and the errors there, from which the budget of memory lets groups choose."""
    if budget.memory is None:
        return list(levels), list(errors)
    model = MemoryModel(memory_in(graph), graph.groups)
    fewest = np.array([allowed[-1] for allowed in levels], float)
    dense = peak_memory(graph, graph.keep_all())
    check_feasible_memory(model, fewest, budget.memory, dense, hint)
    first = caps(model, Allocation(CostModel(graph), levels, errors, {}), _memory_limit(graph, budget))
    return [x[i:] for x, i in zip(levels, first, strict=True)], [x[i:] for x, i in zip(errors, first, strict=True)]


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


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The mask of channels that stay (channels,), the error that each of the others adds (channels,), what becomes
    chains, and what the plan tells about the choice.
    """

    keep: np.ndarray
    errors: np.ndarray
    factorizations: tuple[Factorize, ...]
    told: Mapping[str, float]

    @property
    def error(self) -> float:
        """What is predicted of all edits."""
        return float(self.errors[~self.keep].sum()) + sum(edit.error or 0.0 for edit in self.factorizations)


def _choose(statistics: Statistics, budget: Budget, options: PlanOptions) -> _Chosen:
    """Channels alone; in later rounds ranked anew on the network with the channels that are gone set to zero."""
    graph = statistics.graph
    groups = _movable(graph, options)
    keep, errors = graph.keep_all(), np.zeros(graph.channels)
    for number in range(1, options.rounds + 1):
        rankings = statistics.rankings(groups) if keep.all() else statistics.ranked_after(keep, groups)
        part = number / options.rounds
        if options.threshold is not None:
            counts = _counts_by_threshold(graph, rankings, part * options.threshold, options)
        else:
            step = Budget(**{m: 1 - part * (1 - fraction) for m, fraction in budget.fractions.items()})
            counts = _counts_by_budget(statistics, rankings, step, options)
        fewer = graph.keep_all()
        for group, kept in zip(graph.groups, counts, strict=True):
            if kept < group.channels:
                ranking = rankings[group.name]
                gone = group.start + ranking.order[: group.channels - kept]
                newly = keep[gone]
                errors[gone[newly]] = ranking.errors[: len(gone)][newly]
                fewer[gone] = False
        keep = fewer
    return _Chosen(keep, _scale(statistics) * errors, (), {})


def _choose_mixed(statistics: Statistics, budget: Budget, options: PlanOptions) -> _Chosen:
    """Channels and chains with the least predicted error: chosen together, with the errors of chains of whole layers,
    and the chains once more, of what is left of the layers; or either alone, where that search found no better.
    """
    graph = statistics.graph
    times = statistics.times if budget.latency is not None else None
    offered = [c for name, c in statistics.chains(times is not None).items() if name not in options.exclude]
    groups = _movable(graph, options) if "prune" in options.methods else ()
    rankings = statistics.rankings(groups)
    levels = [allowed if g.name in rankings else allowed[:1]
              for g, allowed in zip(graph.groups, _levels(graph, options), strict=True)]  # fmt: skip
    curves = [np.zeros(1) if len(allowed) == 1 else _scale(statistics) * _curve(rankings[g.name])[allowed[0] - allowed]
              for g, allowed in zip(graph.groups, levels, strict=True)]  # fmt: skip
    hint = _hint(graph, options)
    levels, curves = _within_memory(graph, levels, curves, budget, hint)
    most = np.array([allowed[0] for allowed in levels], float)
    orders = {name: ranking.order for name, ranking in rankings.items()}

    def fitting(choices: Iterable[Choices], counts: np.ndarray) -> list[Choices]:
        if budget.memory is None:
            return list(choices)
        return [_within(graph, own, counts, _memory_limit(graph, budget)) for own in choices]

    offered = fitting(offered, most)
    model = MixedModel(graph, offered, times)
    limits = limits_of(model, graph, budget)
    check_feasible(model, np.array([allowed[-1] for allowed in levels], float), limits, budget, hint)

    def narrower(counts: np.ndarray, forms: Mapping[str, Collection[str]] | None = None) -> list[Choices]:
        """What the layers could become that are left of those offered."""
        left = statistics.chains_after(keep_of(graph, orders, counts), times is not None, forms)
        return fitting((left[choices.layer.name] for choices in offered), counts)

    def chosen(counts: np.ndarray, choices: Sequence[Choices], below: float) -> _Chosen:
        keep = keep_of(graph, orders, counts)
        removed = float(errors[~keep].sum())
        chains, gap = MixedModel(graph, choices, times).best_chains(counts, limits, below - removed)
        edits = tuple(
            Factorize(x.layer.name, chain.form, (chain.rank,), _shape(graph, x.layer, keep), chain.error)
            for x, chain in zip(choices, chains, strict=True)
            if chain is not None
        )
        return _Chosen(keep, errors, edits, {"gap": gap})

    errors = _removal_errors(statistics, rankings)
    tries: list[Callable[[float], _Chosen]] = []
    if rankings:
        alone = Allocation(CostModel(graph, times), levels, curves, limits)
        allocate(alone)
        tries.append(lambda below: chosen(alone.kept, (), below))
        if (priced := model.priced(levels, curves, limits)) is not None:
            counts, prices = priced
            tries.append(lambda below: chosen(counts, narrower(counts, model.promising(counts, prices)), below))
    tries.append(lambda below: chosen(most, offered if (most == model.whole).all() else narrower(most), below))
    best: _Chosen | None = None
    for attempt in tries:
        with contextlib.suppress(Infeasible):
            found = attempt(math.inf if best is None else best.error)
            best = found if best is None or found.error < best.error else best
    return tries[-1](math.inf) if best is None else best


def _within(graph: Graph, choices: Choices, counts: np.ndarray, limit: float) -> Choices:
    """The chains of a layer whose tensors fit beside all that is alive when the groups keep so many channels."""
    model, layer = MemoryModel(memory_in(graph), graph.groups), choices.layer
    sizes = model.sizes(counts)

    def fits(chain: Chain) -> bool:
        layout = layout_in(graph, layer, graph.keep_all(), chain.form, (chain.rank,))
        calls = zip(model.memory.calls[layer.weight], layer.extents, strict=True)
        return all(
            model.memory.in_steps(sizes, operator, between(layout, extent, element)) <= limit
            for (operator, element), extent in calls
        )

    return Choices(layer, tuple(chain for chain in choices.chains if fits(chain)))


def _removal_errors(statistics: Statistics, rankings: Mapping[str, Ranking]) -> np.ndarray:
    """What the removal of each channel adds, (channels,)."""
    errors = np.zeros(statistics.graph.channels)
    for group in statistics.graph.groups:
        if group.name in rankings:
            errors[group.start + rankings[group.name].order] = rankings[group.name].errors
    return _scale(statistics) * errors


def _scale(statistics: Statistics) -> float:
    """What a criterion's error of removals is multiplied with, so that it compares with that of chains."""
    return REMOVAL if statistics.criterion.name in COMPARABLE else 1.0


def _shape(graph: Graph, layer: Layer, keep: np.ndarray) -> tuple[int, ...]:
    return tuple(len(graph.kept((layer.weight, axis), keep)) for axis in range(len(graph.shapes[layer.weight])))


def _counts_by_budget(
    statistics: Statistics, rankings: Mapping[str, Ranking], budget: Budget, options: PlanOptions
) -> list[int]:
    """How many channels each group keeps, so that the budget is met."""
    graph = statistics.graph
    cost = CostModel(graph, statistics.times if budget.latency is not None else None)
    levels = _levels(graph, options)
    limits, hint = limits_of(cost, graph, budget), _hint(graph, options)
    if options.allocation == "uniform":
        errors = even_errors(cost, levels, limits or ("macs",))
    else:
        errors = [np.zeros(1) if len(allowed) == 1 else _curve(rankings[g.name])[allowed[0] - allowed]
                  for g, allowed in zip(graph.groups, levels, strict=True)]  # fmt: skip
    levels, errors = _within_memory(graph, levels, errors, budget, hint)
    check_feasible(cost, np.array([allowed[-1] for allowed in levels], float), limits, budget, hint)
    allocation = Allocation(cost, levels, errors, limits)
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
