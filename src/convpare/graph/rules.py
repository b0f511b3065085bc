"""One rule for each kind of operator: what it couples, and which labels its output bears.

A rule is a function `rule(t, *args, **kwargs) -> Value | tuple[Value, ...]`, registered for the names of the aten
operators that it serves, without overload (`"aten.conv2d"`). Tensors arrive as `Value`, everything else as it stands in
the graph; `t` (a `Tracer`) has `t.labels`, `t.shape` (of the output) and `t.where` (the module, for messages). An
operator without a rule freezes its inputs: nothing is guessed.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.graph.labels import Value, compact, support

if TYPE_CHECKING:
    from convpare.graph.trace import Tracer

Rule = Callable[..., "Value | tuple[Value, ...]"]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators named as in the exported graph, without overload: `@rule("aten.relu")`.

    Raises:
        ConvpareError: an operator has a rule already.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator in RULES:
                raise ConvpareError(f"operator {operator} has a rule already ({RULES[operator].__name__})")
            RULES[operator] = function
        return function

    return register


# ---------------------------------------------------------------------------------------------------------- helpers


def axis_labels(t: "Tracer", x: Value, axis: int) -> Tensor | None:
    """One label for each index along `axis`, shape (size,), or None where `x` has no channels on that axis.

    Labels that share an index (the r² channels that a pixel shuffle packs into one) become one. A field that does not
    vary along `axis` is mixed by whoever asks, and stays.
    """
    axis %= x.ndim
    chosen = x.on(axis)
    t.labels.freeze(_cat(x.off([axis])), f"{t.where} mixes an axis of them that is not its channel axis")
    columns = []
    for field in chosen:
        rows = field.movedim(axis, 0).reshape(field.shape[axis], -1)
        t.labels.unify(rows[:, :1], rows)
        columns.append(rows[:, 0])
    for column in columns[1:]:
        t.labels.unify(columns[0], column)
    return columns[0] if columns else None


def couple_axis(t: "Tracer", x: Value, axis: int, slots: Tensor, reason: str) -> None:
    """Couple the channels of `x` along `axis` to `slots`; where `x` has none there, the slots stay, for `reason`."""
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


def slots_of(t: "Tracer", parameter: Value, axis: int) -> Tensor:
    """One label for each index of a weight's `axis`, shape (size,); fresh ones that must stay if it has none."""
    labels = axis_labels_quiet(t, parameter, axis)
    if labels is not None:
        return labels
    fresh = t.labels.new(parameter.shape[axis])
    if parameter.shape[axis] > 1:
        t.labels.freeze(fresh, f"the weight of {t.where} is computed in a way that hides its channels")
    return fresh


def axis_labels_quiet(t: "Tracer", x: Value, axis: int) -> Tensor | None:
    """As `axis_labels`, without freezing the other fields (a weight has one for every axis)."""
    return axis_labels(t, Value(x.shape, x.on(axis)), axis)


def freeze_values(t: "Tracer", values: Sequence[Value], reason: str) -> None:
    """Nothing in these tensors may go."""
    for value in values:
        t.labels.freeze(_cat(value.fields), reason)


def _cat(fields: Sequence[Tensor]) -> Tensor:
    return torch.cat([f.reshape(-1) for f in fields]) if fields else torch.empty(0, dtype=torch.int64)


def alike(t: "Tracer", labels: Tensor, groups: int) -> Tensor:
    """Couple the labels (groups · size,) slot by slot over the groups; returns the first group's, shape (size,)."""
    rows = labels.reshape(groups, -1)
    t.labels.unify(rows[:1], rows)
    return rows[0]


# ------------------------------------------------------------------------------------------- convolution and linear


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def convolution(t: "Tracer", x: Value, weight: Value, bias: Value | None = None, *rest: Any, **options: Any) -> Value:
    groups = rest[3] if len(rest) > 3 else options.get("groups", 1)
    axis = x.ndim - len(weight.shape) + 1
    out, into = slots_of(t, weight, 0), slots_of(t, weight, 1)
    positions = math.prod(t.shape) // t.shape[axis]
    t.add_layer("conv", positions, positions, groups)
    _couple_groups(t, x, axis, into, out, groups)
    if bias is not None:
        t.labels.unify(slots_of(t, bias, 0), out)
    return Value(t.shape, (along(out, axis, len(t.shape)),))


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def transposed_convolution(
    t: "Tracer", x: Value, weight: Value, bias: Value | None = None, *rest: Any, **options: Any
) -> Value:
    groups = rest[3] if len(rest) > 3 else options.get("groups", 1)
    axis = x.ndim - len(weight.shape) + 1
    into, out = slots_of(t, weight, 0), slots_of(t, weight, 1)
    t.add_layer("conv_transpose", math.prod(x.shape) // x.shape[axis], math.prod(t.shape) // t.shape[axis], groups)
    couple_axis(t, x, axis, into, f"{t.where} reads channels that are not the network's own")
    if groups == 1:
        channels = out
    elif len(out) == 1:  # depthwise: a group goes as a whole
        channels = into.reshape(groups, -1)[:, 0]
        t.labels.unify(into.reshape(groups, -1), channels[:, None])
        t.suspect_groups(channels)
    else:
        alike(t, into, groups)
        channels = out.repeat(groups)
    if bias is not None:
        t.labels.unify(slots_of(t, bias, 0), channels)
    return Value(t.shape, (along(channels, axis, len(t.shape)),))


def _couple_groups(t: "Tracer", x: Value, axis: int, into: Tensor, out: Tensor, groups: int) -> None:
    """Input channels to kernel slots: whole groups where a group reads one channel, else slots alike in every group."""
    reason = f"{t.where} reads channels that are not the network's own"
    if groups == 1:
        couple_axis(t, x, axis, into, reason)
    elif len(into) == 1:
        rows = out.reshape(groups, -1)
        t.labels.unify(rows[:, :1], rows)
        couple_axis(t, x, axis, rows[:, 0], reason)
        t.suspect_groups(rows[:, 0])
    else:
        alike(t, out, groups)
        couple_axis(t, x, axis, into.repeat(groups), reason)


@rule("aten.linear")
def linear(t: "Tracer", x: Value, weight: Value, bias: Value | None = None) -> Value:
    out, into = slots_of(t, weight, 0), slots_of(t, weight, 1)
    positions = math.prod(t.shape[:-1])
    t.add_layer("linear", positions, positions)
    labels = axis_labels_quiet(t, x, -1)
    if labels is None:
        t.labels.freeze(into, f"{t.where} reads features that are not the network's channels")
    else:
        t.labels.unify(labels, into)
    if bias is not None:
        t.labels.unify(slots_of(t, bias, 0), out)
    return Value(t.shape, (*x.off([-1]), along(out, -1, len(t.shape))))


# ---------------------------------------------------------------------------------------------------- normalisation


@rule("aten.batch_norm", "aten.instance_norm", "aten.prelu")
def per_channel(t: "Tracer", x: Value, *parameters: Any) -> Value:
    axis = 1 if x.ndim > 1 else 0
    labels = axis_labels_quiet(t, x, axis)
    if labels is not None:
        t.mend_features(labels)
    for parameter in parameters:
        if isinstance(parameter, Value) and parameter.shape[0] > 1:
            slots = slots_of(t, parameter, 0)
            if labels is not None:
                t.labels.unify(labels, slots)
            else:
                t.labels.freeze(slots, f"{t.where} normalises channels that are not the network's own")
    if len(parameters) > 4 and parameters[4]:  # statistics of the batch or of the instance
        t.freeze_axes(x, [a for a in range(x.ndim) if a != axis], f"{t.where} averages over them")
    return Value(t.shape, x.fields)


@rule("aten.layer_norm")
def layer_norm(
    t: "Tracer",
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    *_: Any,
) -> Value:
    axes = list(range(x.ndim - len(normalized_shape), x.ndim))
    t.freeze_axes(x, axes, f"{t.where} (layer norm) was built for a fixed number of channels and averages over them")
    freeze_values(t, [p for p in (weight, bias) if p is not None], f"{t.where} is a layer norm")
    return Value(t.shape, x.off(axes))


@rule("aten.group_norm")
def group_norm(
    t: "Tracer", x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *_: Any
) -> Value:
    parameters = [p for p in (weight, bias) if p is not None]
    t.freeze_axes(x, [1], f"{t.where} (group norm) averages over channels")
    freeze_values(t, parameters, f"{t.where} is a group norm")
    return Value(t.shape, x.off([1]))


@rule("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax")
def softmax(t: "Tracer", x: Value, dim: int, *_: Any, **__: Any) -> Value:
    t.freeze_axes(x, [dim], f"{t.where} takes a softmax over them")
    return Value(t.shape, x.off([dim]))


# ------------------------------------------------------------------------------------------------ pointwise operators

UNARY = """relu relu_ relu6 hardtanh hardtanh_ sigmoid sigmoid_ hardsigmoid hardsigmoid_ silu silu_ hardswish hardswish_
gelu gelu_ elu elu_ celu selu selu_ leaky_relu leaky_relu_ mish mish_ softplus tanh tanh_ exp log sqrt rsqrt abs
neg square erf sin cos reciprocal dropout dropout_ feature_dropout alpha_dropout contiguous clone detach alias
to _to_copy type_as lift_fresh_copy bernoulli zeros_like ones_like logical_not floor round threshold hardshrink
softshrink log_sigmoid identity softsign nan_to_num isnan""".split()


@rule(*(f"aten.{name}" for name in UNARY))
def unary(t: "Tracer", x: Value, *_: Any, **__: Any) -> Value:
    return Value(t.shape, x.fields)


NARY = """add add_ sub sub_ rsub mul mul_ div div_ true_divide pow pow_ maximum minimum atan2 where lerp addcmul addcdiv
eq ne lt le gt ge logical_and logical_or copy copy_ masked_fill masked_fill_ fmod remainder clamp clamp_
clamp_min clamp_min_ clamp_max clamp_max_""".split()


@rule(*(f"aten.{name}" for name in NARY))
def pointwise(t: "Tracer", *args: Any, **kwargs: Any) -> Value:
    """Operands that meet element by element have the same channels."""
    operands = [_aligned(a, t.shape) for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    fields: list[Tensor] = []
    for number, operand in enumerate(operands):
        others = operands[:number] + operands[number + 1 :]
        for field in operand.fields:
            if not _has_partners(field, others):
                t.labels.freeze(field, f"{t.where} combines them with a tensor of fixed size")
            elif not (partner := _overlapping(field, fields)):
                fields.append(field)
            else:
                for known in partner:
                    t.labels.unify(known, field)
    return Value(t.shape, tuple(fields))


def _aligned(x: Value, shape: tuple[int, ...]) -> Value:
    missing = [1] * (len(shape) - x.ndim)
    return Value((*missing, *x.shape), tuple(f.reshape(*missing, *f.shape) for f in x.fields))


def _has_partners(field: Tensor, others: Sequence[Value]) -> bool:
    axes = support(field)
    return all(other.on(axis) for other in others for axis in axes if other.shape[axis] > 1)


def _overlapping(field: Tensor, fields: Sequence[Tensor]) -> list[Tensor]:
    axes = set(support(field))
    return [f for f in fields if axes & set(support(f))]


# --------------------------------------------------------------------------------------------- pooling, spatial resize

POOLS = {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d",
    2: """max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d
          upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa""",
    3: "max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d",
}


def _spatial(axes: int) -> Rule:
    def spatial(t: "Tracer", x: Value, *_: Any, **__: Any) -> Value | tuple[Value, ...]:
        last = list(range(x.ndim - axes, x.ndim))
        t.freeze_axes(x, last, f"{t.where} pools or resizes the axis that they lie on")
        if t.name.startswith("aten.adaptive_max_pool"):  # values and indices
            return tuple(Value(shape, x.off(last)) for shape in t.shapes)
        return Value(t.shape, x.off(last))

    return spatial


for _axes, _names in POOLS.items():
    rule(*(f"aten.{name}" for name in _names.split()))(_spatial(_axes))


@rule("aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.std")
def reduction(t: "Tracer", x: Value, dim: Any = None, *rest: Any, **options: Any) -> Value:
    if isinstance(dim, bool):  # var(x, unbiased) and std(x, unbiased) have no dimensions
        dim = None
    dims = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(x.ndim))
    axes = sorted(d % x.ndim for d in dims)
    t.freeze_axes(x, axes, f"{t.where} reduces over them")
    kept = x.off(axes)
    if len(t.shape) < x.ndim:
        rest_axes = [a for a in range(x.ndim) if a not in axes]
        kept = tuple(f.reshape([f.shape[a] for a in rest_axes]) for f in kept)
    return Value(t.shape, kept)


@rule("aten.pad", "aten.constant_pad_nd", "aten.reflection_pad1d", "aten.reflection_pad2d", "aten.replication_pad2d")
def pad(t: "Tracer", x: Value, widths: Sequence[int], *rest: Any, **__: Any) -> Value:
    """Spatial padding belongs to the channel it pads; padding of channels makes channels that are nobody's."""
    mode = (*rest, "constant")[0] if t.name == "aten.pad" else t.name
    fields = []
    for field in x.fields:
        axes = [a for a in support(field) if any(_widths(widths, x.ndim, a))]
        if not axes:
            fields.append(field)
        elif mode not in ("constant", "aten.constant_pad_nd"):
            t.labels.freeze(field, f"{t.where} pads the axis that they lie on with copies of them")
        elif len(axes) == 1 and support(field) == (axes[0],):
            fields.append(_pad_channels(t, field, axes[0], _widths(widths, x.ndim, axes[0])))
        else:
            t.labels.freeze(field, f"{t.where} pads an axis on which they are mixed")
    return Value(t.shape, tuple(fields))


def _widths(widths: Sequence[int], ndim: int, axis: int) -> tuple[int, int]:
    start = 2 * (ndim - 1 - axis)
    return (widths[start], widths[start + 1]) if start + 1 < len(widths) else (0, 0)


def _pad_channels(t: "Tracer", field: Tensor, axis: int, widths: tuple[int, int]) -> Tensor:
    before, after = widths
    if before < 0 or after < 0:
        t.labels.freeze(field, f"{t.where} crops channels by a number written in its forward")
        return along(field.reshape(-1)[-before if before < 0 else 0 :][: t.shape[axis]], axis, field.ndim)
    nobody = t.labels.new(before + after)
    labels = torch.cat([nobody[:before], field.reshape(-1), nobody[before:]])
    if not t.mend(labels):
        t.labels.freeze(nobody, f"{t.where} pads channels by a number written in its forward")
        t.suspect(field, f"{t.where} pads them up to a number written in its forward")
    return along(labels, axis, field.ndim)


# ----------------------------------------------------------------------------------- data movement, executed on labels


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(t: "Tracer", tensors: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(t.shape)
    tensors = [x for x in tensors if math.prod(x.shape)]  # an empty tensor concatenates with anything
    across = [Value(x.shape, tuple(f for f in x.fields if f.shape[dim] == 1)) for x in tensors]
    others = pointwise_fields(t, across)
    if not any(x.on(dim) for x in tensors):
        return Value(t.shape, others)
    pieces = []
    for x in tensors:
        labels = axis_labels_quiet(t, x, dim)
        if labels is None:
            labels = t.labels.new(x.shape[dim])
            t.labels.freeze(labels, f"{t.where} concatenates channels that are not the network's own")
        pieces.append(labels)
    return Value(t.shape, (*others, along(torch.cat(pieces), dim, len(t.shape))))


def pointwise_fields(t: "Tracer", values: Sequence[Value]) -> tuple[Tensor, ...]:
    """The fields of tensors that lie side by side: coupled where all have them, frozen where one has none."""
    fields: list[Tensor] = []
    for number, value in enumerate(values):
        for field in value.fields:
            if not _has_partners(field, [*values[:number], *values[number + 1 :]]):
                t.labels.freeze(field, f"{t.where} puts them beside a tensor of fixed size")
            elif partner := _overlapping(field, fields):
                for known in partner:
                    t.labels.unify(known, field)
            else:
                fields.append(field)
    return tuple(fields)


def _execute(t: "Tracer", x: Value, field: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Run the node's own operator on the labels."""
    with torch.no_grad():
        moved = t.target(field.expand(x.shape), *args, **kwargs)
    return compact(moved)


@rule(
    "aten.permute", "aten.transpose", "aten.t", "aten.movedim", "aten.swapaxes", "aten.flatten", "aten.unsqueeze",
    "aten.squeeze", "aten.squeeze_", "aten.unsqueeze_", "aten.numpy_T", "aten.adjoint", "aten.mT", "aten.swapdims",
    "aten.ravel",
)  # fmt: skip
def move(t: "Tracer", x: Value, *args: Any, **kwargs: Any) -> Value:
    """Operators that move whole axes: no number of channels stands in their arguments."""
    return Value(t.shape, tuple(_execute(t, x, f, args, kwargs) for f in x.fields))


@rule(
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.unflatten", "aten.expand", "aten.view_as",
    "aten.reshape_as", "aten.expand_as",
)  # fmt: skip
def reshape(t: "Tracer", x: Value, *args: Any, **kwargs: Any) -> Value:
    """Channels that a reshape splits over several axes go alike along all but the last of them."""
    fields = []
    for field in x.fields:
        moved = compact(field.expand(x.shape).reshape(t.shape) if "expand" not in t.name else field.expand(t.shape))
        axes = support(moved)
        if len(axes) > len(support(field)):
            first = moved
            for axis in axes[:-1]:
                first = first.narrow(axis, 0, 1)
            t.labels.unify(first, moved)
            moved = first
        if _is_spelled(args, t.shape, support(moved)):
            t.suspect(moved, f"{t.where} reshapes them to sizes written in its forward")
        fields.append(moved)
    return Value(t.shape, tuple(fields))


def _is_spelled(args: Sequence[Any], shape: tuple[int, ...], axes: Sequence[int]) -> bool:
    """Whether the arguments spell out the size of an axis that carries channels (-1 leaves it open)."""
    sizes = args[-1] if args and isinstance(args[-1], list | tuple) else None
    if sizes is None or len(sizes) != len(shape):
        return True
    return any(sizes[axis] != -1 for axis in axes)


@rule("aten.slice", "aten.narrow", "aten.select", "aten.index_select", "aten.roll", "aten.flip")
def pick(t: "Tracer", x: Value, *args: Any, **kwargs: Any) -> Value:
    """Operators that pick by position: whole axes pass, channels picked by a number must stay."""
    axes = _picked_axes(t.name, x.ndim, args, kwargs)
    if any(isinstance(a, Value) for a in args):  # positions that are computed
        t.freeze_axes(x, axes, f"{t.where} picks channels by computed positions")
        return Value(t.shape, x.off(axes))
    fields = []
    for field in x.fields:
        moved = _execute(t, x, field, args, kwargs)
        hit = [a for a in axes if field.shape[a] > 1]
        if hit and not (t.name == "aten.slice" and moved.shape == field.shape):
            t.labels.freeze(field, f"{t.where} picks channels by numbers written in its forward")
        fields.append(moved)
    return Value(t.shape, tuple(fields))


def _picked_axes(name: str, ndim: int, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
    position = {"aten.roll": 1, "aten.flip": 0}.get(name, 0)
    dims = kwargs.get("dims", kwargs.get("dim", args[position] if len(args) > position else []))
    dims = [dims] if isinstance(dims, int) else list(dims)
    return [d % ndim for d in dims] or list(range(ndim))


@rule("aten.chunk", "aten.split", "aten.split_with_sizes", "aten.tensor_split", "aten.unbind")
def split(t: "Tracer", x: Value, *args: Any, **kwargs: Any) -> tuple[Value, ...]:
    """Equal parts shrink alike; parts of sizes written in the forward stay."""
    dim = kwargs.get("dim", args[-1] if len(args) == 2 or (args and t.name == "aten.unbind") else 0) % x.ndim
    for field in x.on(dim):
        _tie_parts(t, field, dim)
    parts: list[list[Tensor]] = [[] for _ in t.shapes]
    for field in x.fields:
        for part, moved in zip(parts, t.target(field.expand(x.shape), *args, **kwargs), strict=True):
            part.append(compact(moved))
    return tuple(Value(shape, tuple(fields)) for shape, fields in zip(t.shapes, parts, strict=True))


def _tie_parts(t: "Tracer", field: Tensor, dim: int) -> None:
    if t.name == "aten.unbind":
        t.labels.freeze(field, f"{t.where} unbinds the axis that they lie on")
        return
    sizes = {shape[dim] for shape in t.shapes}
    if len(sizes) > 1:
        t.labels.freeze(field, f"{t.where} splits them into parts of sizes written in its forward")
        return
    parts = field.unflatten(dim, (len(t.shapes), sizes.pop()))
    t.labels.unify(parts.narrow(dim, 0, 1), parts)
    if t.name != "aten.chunk":
        t.suspect(field, f"{t.where} splits them into parts of a size written in its forward")


@rule("aten.pixel_shuffle")
def pixel_shuffle(t: "Tracer", x: Value, factor: int) -> Value:
    """The r² channels that become one go together."""
    fields = []
    for field in x.fields:
        moved = _execute(t, x, field, [factor], {})
        channels = moved.narrow(-1, 0, 1).narrow(-2, 0, 1)
        t.labels.unify(channels, moved)
        fields.append(compact(channels))
    return Value(t.shape, tuple(fields))


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(t: "Tracer", x: Value, factor: int) -> Value:
    return Value(t.shape, tuple(_execute(t, x, f, [factor], {}) for f in x.fields))


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(t: "Tracer", x: Value, groups: int) -> Value:
    fields = []
    for field in x.fields:
        if field.shape[1] > 1:
            alike(t, field.movedim(1, 0).reshape(x.shape[1], -1)[:, 0], groups)
        fields.append(_execute(t, x, field, [groups], {}))
    return Value(t.shape, tuple(fields))


@rule("aten.stack")
def stack(t: "Tracer", tensors: Sequence[Value], dim: int = 0) -> Value:
    fields = pointwise_fields(t, list(tensors))
    return Value(t.shape, tuple(f.unsqueeze(dim) for f in fields))


# ------------------------------------------------------------------------------------------------------------ constants


@rule(
    "aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.arange", "aten.scalar_tensor", "aten.rand",
    "aten.randn", "aten.linspace", "aten.eye", "aten.tensor", "aten.new_zeros", "aten.new_ones",
    "aten.new_full", "aten.new_empty",
)  # fmt: skip
def constant(t: "Tracer", *_: Any, **__: Any) -> Value:
    return Value(t.shape)


@rule("aten._assert_tensor_metadata")
def nothing(t: "Tracer", *_: Any, **__: Any) -> Value:
    """What the exporter writes beside a conversion of types; no value flows from it."""
    return Value(())
