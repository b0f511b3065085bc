"""Numbers written in a forward: a trial surgery on fake tensors tells whether the forward follows the channels."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convpare.errors import ConvpareError
from convpare.graph.capture import capture
from convpare.graph.labels import Value
from convpare.graph.record import Record
from convpare.graph.structure import Graph, Group
from convpare.graph.surgery import remove_


def failing_suspects(
    model: nn.Module, args: tuple[Tensor, ...], graph: Graph, record: Record
) -> list[tuple[Tensor, str]]:
    """The suspected labels whose removal the forward of `model` does not survive, each with its reason.

    A forward that computes its sizes from `x.shape` survives; one with the numbers written out raises, or comes to
    other shapes than the labels foretell. Only the groups that a suspicion touches are tried, first all at once, then
    one by one.
    """
    if not record.suspects:
        return []
    classes = record.labels.classes()

    def survives(groups: Iterable[Group]) -> bool:
        keep = graph.keep_all()
        for group in groups:
            if group.channels > 1:
                keep[group.start] = False
        return _survives(model, args, graph, record, classes, keep)

    touched = [
        (labels, reason, _groups_of(classes[labels.numpy()], record, graph, classes))
        for labels, reason in record.suspects
    ]
    groups = sorted({group for _, _, found in touched for group in found}, key=lambda g: g.start)
    if not groups or survives(groups):
        return []
    fatal = {group for group in groups if not survives([group])}
    if not fatal or not survives(group for group in groups if group not in fatal):
        fatal = set(groups)  # each alone is fine, together they are not: none may go
    return [(labels, reason) for labels, reason, found in touched if fatal & found]


def _groups_of(wanted: np.ndarray, record: Record, graph: Graph, classes: np.ndarray) -> set[Group]:
    """The groups whose channels are of these classes, found through the slots that bear the same class."""
    found: set[Group] = set()
    starts = [g.start for g in graph.groups]
    for axis, units in graph.units.items():
        hit = units[np.isin(_classes_of(axis, units, record, classes), wanted) & (units >= 0)]
        found |= {graph.groups[i] for i in np.unique(np.searchsorted(starts, hit, side="right") - 1).tolist()}
    return found


def _classes_of(axis: tuple[str, int], units: np.ndarray, record: Record, classes: np.ndarray) -> np.ndarray:
    start = record.slots[axis]
    return classes[start : start + len(units)]


def _survives(
    model: nn.Module, args: tuple[Tensor, ...], graph: Graph, record: Record, classes: np.ndarray, keep: np.ndarray
) -> bool:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {id(x): _fake(mode, x) for x in [*model.parameters(), *model.buffers()]}
    trial = copy.deepcopy(model, memo)  # tensors that are neither, if any, are copied as they are
    with mode, torch.no_grad():
        fake_args = tuple(mode.from_tensor(x) for x in args)
        remove_(trial, graph, keep)
        try:
            program = capture(trial, fake_args)
        except ConvpareError:  # whatever the user's forward raises when a size no longer fits
            return False
    gone = np.zeros(len(classes), bool)
    for axis, units in graph.units.items():
        gone[_classes_of(axis, units, record, classes)[(units >= 0) & ~keep[units]]] = True
    stays = torch.from_numpy(~gone[classes])
    nodes = list(program.graph.nodes)
    return len(nodes) == len(record.values) and all(
        _as_foretold(node.meta.get("val"), value, stays) for node, value in zip(nodes, record.values, strict=True)
    )


def _as_foretold(result: Any, value: Any, stays: Tensor) -> bool:
    """Whether a tensor of the smaller net has the shape that the labels of the whole one foretell."""
    if isinstance(result, list | tuple):
        return all(_as_foretold(r, v, stays) for r, v in zip(result, value, strict=True))
    if not isinstance(result, Tensor) or not isinstance(value, Value):
        return True
    shape = list(value.shape)
    for axis in range(value.ndim):
        for field in value.on(axis):
            rows = stays[field].movedim(axis, 0).reshape(field.shape[axis], -1)
            shape[axis] = int(rows.any(1).sum())
    return shape == list(result.shape)


def _fake(mode: FakeTensorMode, x: Tensor) -> Tensor:
    fake = mode.from_tensor(x.detach())
    return nn.Parameter(fake, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else fake
