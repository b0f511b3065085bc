"""What several rules need: labels of an axis, fields without some axes, operators run on labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convpare.graph.labels import Value, compact, support
from convpare.graph.tracer import Tracer

NOT_OURS = "channels that are not the network's own"


def axis_labels(t: Tracer, x: Value, axis: int) -> Tensor | None:
    """One label for each index along `axis`, shape (size,), or None where `x` has no channels on that axis.

    Labels that share an index (the r² channels that a pixel shuffle packs into one) become one.
    """
    axis %= x.ndim
    columns = []
    for field in x.on(axis):
        rows = field.movedim(axis, 0).reshape(field.shape[axis], -1)
        t.labels.unify(rows[:, :1], rows)
        columns.append(rows[:, 0])
    for column in columns[1:]:
        t.labels.unify(columns[0], column)
    return columns[0] if columns else None


def couple_axis(t: Tracer, x: Value, axis: int, slots: Tensor, reason: str) -> None:
    """Couple the channels of `x` along `axis` to `slots`; where `x` has none there, the slots stay, for `reason`.

    A field that does not vary along `axis` is mixed by whoever asks, and stays.
    """
    t.labels.freeze(flat(x.off([axis])), f"{t.where} mixes an axis of them that is not its channel axis")
    labels = axis_labels(t, x, axis)
    if labels is None:
        t.labels.freeze(slots, reason)
    else:
        t.labels.unify(labels, slots)


def along(labels: Tensor, axis: int, ndim: int) -> Tensor:
    """Labels of shape (size,) as a compact field of an activation with `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return compact(labels.reshape(shape))


def slots_of(t: Tracer, parameter: Value, axis: int) -> Tensor:
    """One label for each index of a weight's `axis`, shape (size,); fresh ones that must stay if it has none."""
    labels = axis_labels(t, parameter, axis)
    if labels is not None:
        return labels
    fresh = t.labels.new(parameter.shape[axis])
    if parameter.shape[axis] > 1:
        t.labels.freeze(fresh, f"the weight of {t.where} is computed in a way that hides its channels")
    return fresh


def without(t: Tracer, x: Value, axes: Sequence[int]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The fields of `x` that live outside `axes`, and those that live on them alone.

    Channels that lie on axes of both kinds (heads × channels of a head) go alike along `axes`, and live outside.
    """
    chosen = {axis % x.ndim for axis in axes}
    outside, inside = [], []
    for field in x.fields:
        hit = chosen & set(support(field))
        if hit and len(hit) == len(support(field)):
            inside.append(field)
            continue
        first = field
        for axis in hit:
            first = first.narrow(axis, 0, 1)
        if hit:
            t.labels.unify(first, field)
        outside.append(first)
    return tuple(outside), tuple(inside)


def freeze_values(t: Tracer, values: Sequence[Value], reason: str) -> None:
    """Nothing in these tensors may go."""
    for value in values:
        t.labels.freeze(flat(value.fields), reason)


def flat(fields: Sequence[Tensor]) -> Tensor:
    """All labels of these fields, shape (count,)."""
    return torch.cat([f.reshape(-1) for f in fields]) if fields else torch.empty(0, dtype=torch.int64)


def alike(t: Tracer, labels: Tensor, groups: int) -> Tensor:
    """Couple the labels (groups · size,) slot by slot over the groups; returns the first group's, shape (size,)."""
    rows = labels.reshape(groups, -1)
    t.labels.unify(rows[:1], rows)
    return rows[0]


def together(t: Tracer, labels: Tensor, groups: int) -> Tensor:
    """Couple all labels of each group of (groups · size,); returns one a group, shape (groups,)."""
    rows = labels.reshape(groups, -1)
    t.labels.unify(rows[:, :1], rows)
    return rows[:, 0]


def executed(t: Tracer, x: Value, field: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Run the node's own operator on the labels."""
    with torch.no_grad():
        return compact(t.target(field.expand(x.shape), *args, **kwargs))


def squeezed(fields: Sequence[Tensor], axes: Sequence[int], ndim: int) -> tuple[Tensor, ...]:
    """Fields without `axes`, along which they are constant."""
    gone = {axis % ndim for axis in axes}
    return tuple(f.reshape([size for axis, size in enumerate(f.shape) if axis not in gone]) for f in fields)
