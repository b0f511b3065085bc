"""Carry a plan out: surgery on a copy, and the proof that it was right."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.factorize.edit import chain_error, factorized
from convpare.factorize.metric import Metric
from convpare.graph.check import SelfCheck, culprits, self_check
from convpare.graph.merging import merged_in_turn
from convpare.graph.structure import Form, Graph
from convpare.graph.surgery import removed
from convpare.graph.trace import trace
from convpare.planning.cost import planned_cost
from convpare.planning.options import metrics_of, restricted
from convpare.planning.plan import Plan
from convpare.planning.planner import calibration_images
from convpare.planning.settings import PlanOptions
from convpare.redundancy.moments import Moments


class FailedCheck(ConvpareError):  # noqa: N818 - what failed is the check
    """The smaller network is not the same function.

    `groups` names the edits that are wrong, each alone: groups, or layers that became chains.
    """

    def __init__(self, check: SelfCheck, groups: tuple[str, ...]) -> None:
        self.check, self.groups = check, groups
        named = ", ".join(groups[:8]) or "no single edit, only all together"
        super().__init__(
            f"{check}. Nothing was changed. Wrong: {named}. Exclude these groups (--exclude) and report the model: "
            "an operator's rule must be mistaken about it."
        )


def apply(
    model: nn.Module,
    plan: Plan,
    data: Data | ImageSet | Tensor | None = None,
    *,
    form: Form | None = None,
    graph: Graph | None = None,
    check: bool = True,
) -> nn.Module:
    """A new module without the channels that `plan` removes; the given one is untouched.

    The plan travels with the result (`plan_of`), so that it can be recovered and saved.

    Args:
        data: calibration images (n, …), an image set, or data whose training images are taken: factorized layers are
            fitted to what they read on these, as the plan has it, and to their weights alone without.
        form: "module": the same class with its own forward; "graph": the captured graph with its numbers rewritten, a
            module that needs no other code; "linked": see `trace`. By default the form that the plan was made for; a
            plan for the module form can be carried out in the graph form, too.
        graph: the trace of `model` (with the plan's merges done) in the plan's form, if it is at hand; else the model
            is traced on inputs of the plan's shapes.
        check: prove zeroed == removed in float64.

    Raises:
        FailedCheck: the proof failed; it names the edits.
        ConvpareError: the plan was not made for this model, or for the graph form where the module form is wanted.
    """
    small, _ = carry_out(model, plan, data, form=form, graph=graph, check=check)
    return small


def carry_out(
    model: nn.Module,
    plan: Plan,
    data: Data | ImageSet | Tensor | None = None,
    *,
    metrics: Mapping[str, Metric] | None = None,
    form: Form | None = None,
    graph: Graph | None = None,
    check: bool = True,
) -> tuple[nn.Module, SelfCheck | None]:
    """As `apply`, with the self-check's result.

    Args:
        metrics: in place of data, what errors of whole layers cost, if it is known; see `metrics_of`.
    """
    model = merged_for(model, plan)
    graph = graph_for(model, plan) if graph is None else graph
    plan = plan.made_true(graph)
    keep = plan.keep(graph)
    if form not in (None, plan.form):
        if form != "graph":
            raise ConvpareError(f"the plan was made for the {plan.form} form; it cannot be carried out as {form!r}")
        graph, keep = _as_graph(graph, keep, trace(model, example_inputs(model, plan), form="graph"))
        plan = replace(plan, after=planned_cost(graph, keep, plan.factorizations))
    result = self_check(model, graph, keep) if check else None
    if result is not None and not result.passed:
        raise FailedCheck(result, tuple(group.name for group in culprits(model, graph, keep)))
    small = removed(model, graph, keep)
    if plan.factorizations:
        known = _metrics(model, graph, plan, data) if metrics is None else metrics
        layers = (graph.layer(edit.layer) for edit in plan.factorizations)
        left = {x.name: restricted(known[x.name], graph, x, keep) for x in layers if x.name in known}
        small, result = _factorized(small, graph, plan, result, left)
    _notes(small)["_convpare_plan"] = plan
    return small, result


def _factorized(
    small: nn.Module, graph: Graph, plan: Plan, result: SelfCheck | None, metrics: Mapping[str, Metric]
) -> tuple[nn.Module, SelfCheck | None]:
    """The network with chains, and the check, where one is wanted, with that of the chains."""
    chained, factors = factorized(small, plan.factorizations, metrics)
    if result is None:
        return chained, None
    error = chain_error(small, chained, graph, factors)
    result = replace(result, max_relative_error=float(np.max([result.max_relative_error, error])))
    if not result.passed:
        alone = {e.layer: factorized(small, [e], metrics) for e in plan.factorizations}
        errors = {name: chain_error(small, net, graph, own) for name, (net, own) in alone.items()}
        raise FailedCheck(result, tuple(name for name, error in errors.items() if not error <= result.tolerance))
    return chained, result


def _metrics(model: nn.Module, graph: Graph, plan: Plan, data: Data | ImageSet | Tensor | None) -> dict[str, Metric]:
    """What errors of the layers to factorize cost, by the measure that the plan was made with."""
    images = None if data is None else calibration_images(data, *(_number(plan, key) for key in ("images", "seed")))
    if images is None:
        return {}
    layers = [graph.layer(edit.layer) for edit in plan.factorizations]
    layers = [layer for layer in layers if layer.groups == 1 or layer.kind == "conv"]
    return metrics_of(Moments(model, images), layers, plan.criterion == "sensitivity")


def _number(plan: Plan, name: str) -> int:
    found = plan.options.get(name, getattr(PlanOptions(), name))
    if type(found) is not int or found < 0:
        raise ConvpareError(f"the plan's option {name} is {found!r}; expected a whole number of 0 or more")
    return found


def _as_graph(module: Graph, keep: np.ndarray, graph: Graph) -> tuple[Graph, np.ndarray]:
    """The same removal in the graph form, whose channels are coupled to no more than those of the module form."""
    wanted = graph.keep_all()
    for axis, units in module.units.items():
        gone = graph.units.get(axis, np.full(len(units), -1))[(units >= 0) & ~keep[units]]
        if (gone < 0).any():
            raise ConvpareError(
                f"the graph form of {module.model} cannot lose the channels of {axis[0]} that the plan removes"
            )
        wanted[gone] = False
    return graph, wanted


def graph_for(merged: nn.Module, plan: Plan) -> Graph:
    """The trace of a model with the plan's merges done, on the inputs and in the form that the plan was made for."""
    inputs = example_inputs(merged, plan)
    try:
        return trace(merged, inputs, form=plan.form)
    except ConvpareError as error:
        raise ConvpareError(f"the plan was made for {plan.model}, and does not suit this network: {error}") from error


def merged_for(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with the plan's merges done; itself where there are none."""
    return merged_in_turn(model, plan.merges, example_inputs(model, plan))


def example_inputs(model: nn.Module, plan: Plan) -> tuple[Tensor, ...]:
    """Zeros of the shapes that the plan was made for."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
    return tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in plan.inputs)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that `apply` carried out on this module, or on the one that it is a copy of."""
    found = _notes(model).get("_convpare_plan")
    return found if isinstance(found, Plan) else None


def with_plan(model: nn.Module, plan: Plan | None) -> nn.Module:
    """The same module with a plan of its own, as a saved one has."""
    if plan is not None:
        _notes(model)["_convpare_plan"] = copy.copy(plan)
    return model


def _notes(model: nn.Module) -> dict[str, Any]:
    """Where a module keeps what its copies shall know, too."""
    return model.meta if isinstance(model, fx.GraphModule) else model.__dict__
