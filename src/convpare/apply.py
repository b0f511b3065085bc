"""Carry a plan out: surgery on a copy, and the proof that it was right."""

import copy

import torch
from torch import nn

from convpare.errors import ConvpareError
from convpare.graph.check import SelfCheck, culprits, self_check
from convpare.graph.structure import Graph
from convpare.graph.surgery import removed
from convpare.graph.trace import trace
from convpare.planning.plan import Plan


class FailedCheck(ConvpareError):  # noqa: N818 - what failed is the check
    """The smaller network is not the same function; `groups` names the edits that are wrong, each alone."""

    def __init__(self, check: SelfCheck, groups: tuple[str, ...]) -> None:
        self.check, self.groups = check, groups
        named = ", ".join(groups[:8]) or "no single edit, only all together"
        super().__init__(
            f"{check}. Nothing was changed. Wrong: {named}. Exclude these groups (--exclude) and report the model: "
            "an operator's rule must be mistaken about it."
        )


def apply(model: nn.Module, plan: Plan, *, graph: Graph | None = None, check: bool = True) -> nn.Module:
    """A new module of the same class without the channels that `plan` removes; the given one is untouched.

    The plan travels with the result (`plan_of`), so that it can be recovered and saved.

    Args:
        graph: the trace of `model`, if it is at hand; else the model is traced on inputs of the plan's shapes.
        check: prove zeroed == removed in float64.

    Raises:
        FailedCheck: the proof failed; it names the edits.
        ConvpareError: the plan was not made for this model.
    """
    small, _ = carry_out(model, plan, graph=graph, check=check)
    return small


def carry_out(
    model: nn.Module, plan: Plan, *, graph: Graph | None = None, check: bool = True
) -> tuple[nn.Module, SelfCheck | None]:
    """As `apply`, with the self-check's result."""
    graph = graph_for(model, plan) if graph is None else graph
    keep = plan.keep(graph)
    result = self_check(model, graph, keep) if check else None
    if result is not None and not result.passed:
        raise FailedCheck(result, tuple(group.name for group in culprits(model, graph, keep)))
    small = removed(model, graph, keep)
    small.__dict__["_convpare_plan"] = plan
    return small, result


def graph_for(model: nn.Module, plan: Plan) -> Graph:
    """The trace of `model` on inputs of the shapes that the plan was made for."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
    inputs = tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in plan.inputs)
    return trace(model, inputs)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan that `apply` carried out on this module, or on the one that it is a copy of."""
    found = model.__dict__.get("_convpare_plan")
    return found if isinstance(found, Plan) else None


def with_plan(model: nn.Module, plan: Plan | None) -> nn.Module:
    """The same module with a plan of its own, as a saved one has."""
    if plan is not None:
        model.__dict__["_convpare_plan"] = copy.copy(plan)
    return model
