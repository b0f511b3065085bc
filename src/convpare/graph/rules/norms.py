"""Normalisations. Where one averages over channels, the others change when some go: such channels are marked."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convpare.graph.labels import Value, support
from convpare.graph.rules.common import (
    NOT_OURS,
    axis_labels,
    couple_axis,
    flat,
    freeze_values,
    slots_of,
    together,
    without,
)
from convpare.graph.rules.registry import aten, rule
from convpare.graph.tracer import Tracer


@rule(*aten("batch_norm instance_norm prelu"))
def per_channel(t: Tracer, x: Value, *parameters: Any) -> Value:
    axis = 1 if x.ndim > 1 else 0
    labels = axis_labels(t, x, axis)
    if labels is not None:
        t.has_features(labels)
    fields = x.fields
    if len(parameters) > 4 and parameters[4]:  # statistics of the batch or of the instance
        fields = _averaged(t, x, [a for a in range(x.ndim) if a != axis])
    _couple(t, labels, [p for p in parameters if isinstance(p, Value)])
    affine = t.name != "aten.prelu" and isinstance(parameters[0], Value)
    return Value(t.shape, fields, zero=x.zero or affine)


def _couple(t: Tracer, labels: Tensor | None, parameters: Sequence[Value]) -> None:
    """One entry of every parameter for each channel."""
    for parameter in parameters:
        if math.prod(parameter.shape) > 1:
            slots = slots_of(t, parameter, parameter.ndim - 1)
            if labels is not None:
                t.labels.unify(labels, slots)
            else:
                t.labels.freeze(slots, f"{t.where} normalises {NOT_OURS}")


def _averaged(t: Tracer, x: Value, axes: Sequence[int]) -> tuple[Tensor, ...]:
    """The fields of `x` after a normalisation over `axes`, by nature another one without some of their channels."""
    outside, inside = without(t, x, axes)
    t.labels.mark_inexact(flat(inside), f"{t.where} normalises over them")
    return (*outside, *inside)


@rule("aten.layer_norm", "aten.rms_norm")
def layer_norm(t: Tracer, x: Value, normalized_shape: Sequence[int], *parameters: Any, **options: Any) -> Value:
    first = x.ndim - len(normalized_shape)
    fields = _averaged(t, x, range(first, x.ndim))
    affine = [p for p in (*parameters, *options.values()) if isinstance(p, Value)]
    for axis in range(first, x.ndim):
        labels = axis_labels(t, Value(x.shape, tuple(f for f in fields if f.shape[axis] > 1)), axis)
        if labels is not None:
            t.spell((1, axis - first), labels)
        for parameter in affine:
            _match(t, parameter, axis - first, labels)
    inside = all(set(support(f)) <= set(range(first, x.ndim)) for f in fields)
    return Value(t.shape, fields, zero=len(affine) == 2 and inside)


def _match(t: Tracer, parameter: Value, axis: int, labels: Tensor | None) -> None:
    if parameter.shape[axis] > 1:
        slots = slots_of(t, parameter, axis)
        if labels is not None:
            t.labels.unify(labels, slots)
        else:
            t.labels.freeze(slots, f"{t.where} normalises {NOT_OURS}")


@rule("aten.group_norm")
def group_norm(
    t: Tracer, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    """A whole group of the norm goes without touching the others; with one group in all they are averaged over."""
    parameters = [p for p in (weight, bias) if p is not None]
    outside, inside = without(t, x, range(2, x.ndim))
    t.labels.mark_inexact(flat(inside), f"{t.where} normalises over them")
    x = x.like(x.shape, (*outside, *inside))
    labels = axis_labels(t, x, 1)
    if labels is None:
        freeze_values(t, parameters, f"{t.where} normalises {NOT_OURS}")
        return Value(t.shape, x.fields)
    if groups == 1:
        t.labels.mark_inexact(labels, f"{t.where} normalises over them")
    else:
        t.spell((1,), together(t, labels, groups))
    t.has_features(labels)
    _couple(t, labels, parameters)
    return Value(t.shape, x.fields, zero=len(parameters) == 2 and not inside)


@rule(*aten("softmax log_softmax _softmax _log_softmax"))
def softmax(t: Tracer, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    return Value(t.shape, _averaged(t, x, [dim]))


@rule("aten._weight_norm")
def weight_norm(t: Tracer, direction: Value, length: Value, dim: int = 0) -> Value:
    """g · v / ‖v‖, with one norm for each index of `dim`."""
    others = [a for a in range(direction.ndim) if a != dim]
    fields = []
    for field in direction.fields:
        if set(support(field)) <= set(others):
            t.labels.mark_inexact(flat([field]), f"{t.where} normalises the weight over them")
        fields.append(field)
    if direction.name is not None:
        t.spared.add((direction.name, dim))  # 0 / 0: its length goes to zero, which will do
    labels = axis_labels(t, direction, dim)
    if labels is not None and math.prod(length.shape) > 1:
        couple_axis(t, Value(length.shape, length.on(dim)), dim, labels, f"{t.where} scales {NOT_OURS}")
    return Value(t.shape, tuple(fields), zero=True)
