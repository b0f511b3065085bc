"""Convolutions and linear layers: they make channels."""

import math
from typing import Any

from torch import Tensor, nn

from convpare.graph.labels import Value
from convpare.graph.rules.common import NOT_OURS, alike, along, axis_labels, couple_axis, flat, slots_of, together
from convpare.graph.rules.registry import aten, rule
from convpare.graph.structure import Extent
from convpare.graph.tracer import Tracer


@rule(*aten("conv1d conv2d conv3d"))
def convolution(t: Tracer, x: Value, weight: Value, bias: Value | None = None, *rest: Any, **options: Any) -> Value:
    """Input channels to kernel slots: whole groups where a group reads one channel, else slots alike in every group."""
    groups = rest[3] if len(rest) > 3 else options.get("groups", 1)
    axis = x.ndim - weight.ndim + 1
    out, into = slots_of(t, weight, 0), slots_of(t, weight, 1)
    t.add_layer("conv", weight, bias, (out, into), _extent(t, x, axis), groups)
    reason = f"{t.where} reads {NOT_OURS}"
    if groups == 1:
        couple_axis(t, x, axis, into, reason)
    elif len(into) == 1:
        chosen = together(t, out, groups)
        couple_axis(t, x, axis, chosen, reason)
        _spell_groups(t, chosen)
    else:
        alike(t, out, groups)
        couple_axis(t, x, axis, into.repeat(groups), reason)
    return _output(t, axis, out, bias, weight.zero or (x.zero and groups > 1 and len(into) == 1))


@rule(*aten("conv_transpose1d conv_transpose2d conv_transpose3d"))
def transposed_convolution(
    t: Tracer, x: Value, weight: Value, bias: Value | None = None, *rest: Any, **options: Any
) -> Value:
    groups = rest[3] if len(rest) > 3 else options.get("groups", 1)
    axis = x.ndim - weight.ndim + 1
    into, out = slots_of(t, weight, 0), slots_of(t, weight, 1)
    t.add_layer("conv_transpose", weight, bias, (out, into), _extent(t, x, axis), groups)
    couple_axis(t, x, axis, into, f"{t.where} reads {NOT_OURS}")
    if groups > 1 and len(out) == 1:  # depthwise: a group goes as a whole
        out = together(t, into, groups)
        _spell_groups(t, out)
    elif groups > 1:
        alike(t, into, groups)
        out = out.repeat(groups)
    return _output(t, axis, out, bias, weight.zero)


def _extent(t: Tracer, x: Value, axis: int) -> Extent:
    """Of what the layer is given: a module that pads with other than zeros does so before its operator runs.

    Not in the graph form, where the padding is an operator of its own and a chain would come after it.
    """
    into = x.shape[axis + 1 :]
    module = t.modules.get(t.module)
    if t.form != "graph" and isinstance(module, nn.modules.conv._ConvNd) and module.padding_mode != "zeros":
        pads = module._reversed_padding_repeated_twice[::-1]
        into = tuple(size - sum(pads[2 * n : 2 * n + 2]) for n, size in enumerate(into))
    return Extent(math.prod(t.shape[:axis]), tuple(into), tuple(t.shape[axis + 1 :]))


def _spell_groups(t: Tracer, groups: Tensor) -> None:
    t.spell((6,) if len(t.node.args) > 6 else ("groups",), groups)


def _output(t: Tracer, axis: int, out: Tensor, bias: Value | None, zero: bool) -> Value:
    """`zero`: without a bias. A weight or bias that was expanded from one row has no row that goes to zero."""
    if bias is not None:
        t.labels.unify(slots_of(t, bias, 0), out)
    return Value(t.shape, (along(out, axis, len(t.shape)),), zero and (bias is None or bias.zero))


@rule("aten.linear")
def linear(t: Tracer, x: Value, weight: Value, bias: Value | None = None) -> Value:
    out, into = slots_of(t, weight, 0), slots_of(t, weight, 1)
    t.add_layer("linear", weight, bias, (out, into), Extent(math.prod(t.shape[:-1]), (), ()))
    labels = axis_labels(t, x, -1)
    if labels is None:
        t.labels.freeze(into, f"{t.where} reads features that are not the network's channels")
    else:
        t.labels.unify(labels, into)
    t.labels.freeze(flat(x.off([-1])), f"{t.where} runs once for each of them")
    return _output(t, len(t.shape) - 1, out, bias, weight.zero)
