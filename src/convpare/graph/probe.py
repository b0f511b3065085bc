"""Numbers written in a forward: a trial surgery on fake tensors tells whether the forward follows the channels."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convpare.graph.structure import Graph, Group
from convpare.graph.surgery import remove_
from convpare.modes import eval_mode

if TYPE_CHECKING:
    from convpare.graph.trace import Record


def failing_suspects(
    model: nn.Module, args: tuple[Any, ...], graph: Graph, record: "Record"
) -> list[tuple[Tensor, str]]:
    """The suspected labels whose removal the forward of `model` does not survive, each with its reason.

    A forward that computes its sizes from `x.shape` survives; one with the numbers written out raises. Only the
    groups that a suspicion touches are tried, first all at once, then one by one.
    """
    touched = [(labels, reason, _groups_of(labels, record, graph)) for labels, reason in record.suspects]
    groups = sorted({group for _, _, found in touched for group in found}, key=lambda g: g.start)
    if not groups or _survives(model, args, graph, groups):
        return []
    fatal = {group for group in groups if not _survives(model, args, graph, [group])}
    fatal = fatal or set(groups)  # each alone is fine, together they are not: none may go
    return [(labels, reason) for labels, reason, found in touched if fatal & found]


def _groups_of(labels: Tensor, record: "Record", graph: Graph) -> set[Group]:
    """The groups whose channels these labels are, found through the slots that bear the same class."""
    classes = record.labels.classes()
    wanted = np.unique(classes[labels.numpy()])
    found: set[Group] = set()
    starts = [g.start for g in graph.groups]
    for (name, axis), units in graph.units.items():
        start = record.slots[name, axis]
        cls = classes[start : start + len(units)]
        hit = units[np.isin(cls, wanted) & (units >= 0)]
        found |= {graph.groups[i] for i in np.unique(np.searchsorted(starts, hit, side="right") - 1).tolist()}
    return found


def _survives(model: nn.Module, args: tuple[Any, ...], graph: Graph, groups: Iterable[Group]) -> bool:
    keep = graph.keep_all()
    for group in groups:
        if group.channels > 1:
            keep[group.start] = False
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        tensors = [*model.parameters(), *model.buffers()]
        memo: dict[int, Any] = {id(x): _fake(mode, x) for x in tensors}
        trial = copy.deepcopy(model, memo)
        fake_args = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
        remove_(trial, graph, keep)
        with eval_mode(trial):
            try:
                trial(*fake_args)
            except Exception:  # whatever the user's forward raises when a size no longer fits
                return False
    return True


def _fake(mode: FakeTensorMode, x: Tensor) -> Tensor:
    fake = mode.from_tensor(x.detach())
    return nn.Parameter(fake, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else fake
