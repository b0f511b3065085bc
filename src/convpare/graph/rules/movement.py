"""Operators that only move data: they are executed on the labels. Numbers in their arguments that count channels are
spelled out (`t.spell`), so that they can be kept true."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convpare.graph.labels import Value, compact, support
from convpare.graph.rules.common import alike, along, axis_labels, executed, flat, without
from convpare.graph.rules.pointwise import met
from convpare.graph.rules.registry import aten, rule
from convpare.graph.structure import Path
from convpare.graph.tracer import Tracer


@rule(*aten("""permute transpose t movedim moveaxis swapaxes flatten unsqueeze unsqueeze_ numpy_T adjoint mT swapdims
ravel flip fliplr flipud repeat tile repeat_interleave"""))  # fmt: skip
def move(t: Tracer, x: Value, *args: Any, **kwargs: Any) -> Value:
    """No number of channels stands in their arguments."""
    return x.like(t.shape, [executed(t, x, f, args, kwargs) for f in x.fields])


@rule(*aten("squeeze squeeze_"))
def squeeze(t: Tracer, x: Value, dims: Any = (), *_: Any, **__: Any) -> Value:
    """An axis of channels that may be squeezed must not come down to one of them: two stay."""
    named = [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)] or range(x.ndim)
    for axis in named:
        for field in x.on(axis):
            t.labels.freeze(field.narrow(axis, 0, 2), f"{t.where} would take an axis of one channel away")
    return x.like(t.shape, [executed(t, x, f, (dims,) if dims != () else (), {}) for f in x.fields])


@rule("aten.unfold")
def windows(t: Tracer, x: Value, dim: int, *args: int) -> Value:
    kept, gone = without(t, x, [dim])
    t.labels.freeze(flat(gone), f"{t.where} lays windows over them")
    return x.like(t.shape, [executed(t, x, f, (dim, *args), {}) for f in kept])


@rule(*aten("view reshape _unsafe_view unflatten view_as reshape_as"))
def reshape(t: Tracer, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Channels that a reshape splits over several axes will in the end go along one of them."""
    fields = []
    for field in x.fields:
        moved = compact(field.expand(x.shape).reshape(t.shape))
        if len(support(moved)) > len(support(field)):
            t.pack(moved)
        fields.append(moved)
    out = x.like(t.shape, fields)
    if t.name.endswith("_as"):  # the sizes of another tensor
        return x.like(t.shape, met(t, [out, args[0]], "gives them the sizes of"))
    _spell_shape(t, out)
    return out


@rule(*aten("expand expand_as broadcast_to"))
def expand(t: Tracer, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Axes that it makes may be of as many channels as what they meet."""
    missing = len(t.shape) - x.ndim
    fields = [f.reshape(*[1] * missing, *f.shape) for f in x.fields]
    made = [a for a, size in enumerate(t.shape) if size > 1 and (a < missing or x.shape[a - missing] == 1)]
    if t.name == "aten.expand_as":
        likes = [f for f in args[0].fields if set(support(f)) & set(made)]
        here = Value(t.shape, tuple(likes))
        own = Value((*[1] * missing, *x.shape), tuple(fields))
        return Value(t.shape, met(t, [own, here], "gives them the sizes of") if likes else tuple(fields))
    fields += [along(t.labels.new(t.shape[a]), a, len(t.shape)) for a in made]
    out = Value(t.shape, tuple(fields))
    _spell_shape(t, out)
    return out


@rule(*aten("zeros ones full empty new_zeros new_ones new_full new_empty rand randn"))
def created(t: Tracer, *args: Any, **kwargs: Any) -> Value:
    fields = [along(t.labels.new(size), axis, len(t.shape)) for axis, size in enumerate(t.shape) if size > 1]
    out = Value(t.shape, tuple(fields), zero=t.name in ("aten.zeros", "aten.new_zeros"))
    if "rand" in t.name:
        t.labels.freeze(flat(fields), f"{t.where} draws random numbers for them")
    _spell_shape(t, out)
    return out


@rule(*aten("arange scalar_tensor linspace eye tensor"))
def constant(t: Tracer, *_: Any, **__: Any) -> Value:
    return Value(t.shape)


@rule("aten._assert_tensor_metadata")
def nothing(t: Tracer, *_: Any, **__: Any) -> Value:
    """What the exporter writes beside a conversion of types; no value flows from it."""
    return Value(())


def _spell_shape(t: Tracer, out: Value) -> None:
    """The sizes in the arguments that count channels (-1 leaves a size open)."""
    position = next((n for n, a in enumerate(t.node.args) if isinstance(a, list | tuple)), None)
    sizes: Any = t.node.args[position] if position is not None else t.node.kwargs.get("size", ())
    dim: Any = t.node.args[1] if t.name == "aten.unflatten" else 0
    first = dim % (len(t.shape) - len(sizes) + 1)
    for number, size in enumerate(sizes):
        fields = out.on(first + number) if size != -1 else ()
        if len(fields) > 1:
            t.labels.freeze(flat(fields), f"{t.where} lays several kinds of channels on one axis")
        elif fields:
            path = ("size", number) if position is None else (position, number)
            t.spell(path, fields[0], first + number)


def _column(field: Tensor, axis: int) -> Tensor:
    """The labels along `axis` where all other axes are at 0: once the channels go along one axis, all that matters."""
    return field.movedim(axis, 0).reshape(field.shape[axis], -1)[:, 0]


# ------------------------------------------------------------------------------------------------- parts of an axis


@rule("aten.slice", "aten.narrow")
def pick_range(t: Tracer, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """The numbers that bound the range count channels; a step takes every step-th of what is left."""
    size = x.shape[dim]
    begin, stop, step = slice(start, end, step).indices(size)
    if t.name == "aten.narrow":
        begin = start if start >= 0 else start + size  # an empty range may begin at the end
        stop = begin + end
    fields = []
    for field in x.fields:
        if field.shape[dim % x.ndim] > 1:
            _bounds(t, field, dim % x.ndim, begin, stop, step)
        index = [slice(None)] * x.ndim
        if field.shape[dim % x.ndim] > 1:
            index[dim % x.ndim] = slice(begin, stop, step)
        fields.append(_part(t, field, compact(field[tuple(index)]), dim % x.ndim))
    return x.like(t.shape, fields)


def _part(t: Tracer, field: Tensor, part: Tensor, axis: int) -> Tensor:
    """A part of an axis of channels; one channel alone, or several times, has no axis to be told by, and stays."""
    if field.shape[axis] > 1 and part.shape[axis] == 1:
        t.labels.freeze(part, f"{t.where} makes a part of one channel")
    return part


def _bounds(t: Tracer, field: Tensor, axis: int, begin: int, stop: int, step: int) -> None:
    size = field.shape[axis]
    if step > 1:
        whole = (stop - begin) // step * step
        rows = field.narrow(axis, begin, whole).unflatten(axis, (-1, step))
        t.labels.unify(rows.narrow(axis + 1, 0, 1), rows)
        rest = field.narrow(axis, begin + whole, stop - begin - whole)
        if rest.shape[axis]:
            t.labels.unify(rest.narrow(axis, 0, 1), rest)
    if t.name == "aten.narrow":
        if t.form == "module" and t.node.args[2] != begin:
            _from_the_end(t, field, axis, (begin, size), (2,))
        else:
            t.spell((2,), field, axis, (0, begin))
        t.spell((3,), field, axis, (begin, stop))
        return
    for position, bound in ((2, begin), (3, stop)):
        written = t.node.args[position] if len(t.node.args) > position else None
        if isinstance(written, int) and written < 0 and t.form == "module":
            t.labels.freeze(
                field.narrow(axis, size - 1, 1), f"{t.where} counts from the last of them"
            )  # -0 is the front
            t.spell((position,), field, axis, (bound, size), sign=-1)
        elif isinstance(written, int) and written <= size:
            t.spell((position,), field, axis, (0, bound))


def _from_the_end(t: Tracer, field: Tensor, axis: int, span: tuple[int, int], path: Path) -> None:
    t.labels.freeze(field.narrow(axis, span[1] - 1, 1), f"{t.where} counts from the last of them")  # -0 is the front
    t.spell(path, field, axis, span, sign=-1)


@rule("aten.select")
def pick_one(t: Tracer, x: Value, dim: int, index: int) -> Value:
    """One channel by its number stays, and its number is how many before it do."""
    dim %= x.ndim
    fields = []
    for field in x.fields:
        if field.shape[dim] == 1:
            fields.append(field.squeeze(dim))
        elif len(support(field)) > 1:  # one of several alike: queries, keys, values
            t.labels.unify(field.narrow(dim, 0, 1), field)
            fields.append(field.select(dim, 0))
        else:
            t.labels.freeze(field.select(dim, index), f"{t.where} picks this channel by its number")
            if index < 0:
                t.spell((2,), field, dim, (field.shape[dim] + index + 1, field.shape[dim]), sign=-1, offset=-1)
            else:
                t.spell((2,), field, dim, (0, index))
    return x.like(t.shape, fields)


@rule("aten.roll")
def roll(t: Tracer, x: Value, shifts: Any, dims: Any = (), **__: Any) -> Value:
    axes = [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)] or list(range(x.ndim))
    t.freeze_axes(x, axes, f"{t.where} rolls the axis that they lie on")
    return x.like(t.shape, [executed(t, x, f, (shifts, dims), {}) for f in x.fields])


@rule("aten.index_select")
def index_select(t: Tracer, x: Value, dim: int, index_: Value) -> Value:
    """Positions that the graph itself holds are followed (a channel shuffle), computed ones are not."""
    positions = t.constant(2)
    if positions is None:
        return _index(t, x, [dim], (dim, index_))
    fields = []
    for field in x.fields:
        moved = field
        if field.shape[dim] > 1:
            moved = compact(field.index_select(dim, positions))
            if len(positions.unique()) == len(positions):
                t.shuffle(_column(field, dim), positions)
            else:
                t.labels.freeze(field, f"{t.where} picks channels more than once")
        fields.append(moved)
    return x.like(t.shape, fields)


@rule("aten.index")
def index(t: Tracer, x: Value, positions: Sequence[Value | None]) -> Value:
    """Axes that are picked from by computed positions stay, the others pass."""
    return _index(t, x, [axis for axis, chosen in enumerate(positions) if chosen is not None], (positions,))


def _index(t: Tracer, x: Value, axes: Sequence[int], args: Sequence[Any]) -> Value:
    for chosen in args[-1] if isinstance(args[-1], list | tuple) else args[-1:]:
        if isinstance(chosen, Value):
            t.labels.freeze(flat(chosen.fields), f"{t.where} picks by them")
    kept, gone = without(t, x, axes)
    t.labels.freeze(flat(gone), f"{t.where} picks channels by computed positions")
    return x.like(t.shape, [executed(t, x, field, _at_zero(args), {}) for field in kept])


@rule("aten.gather", "aten.take_along_dim")
def gather(t: Tracer, x: Value, dim: int, positions: Value, **__: Any) -> Value:
    """Along `dim` by computed positions; every other axis is that of the positions."""
    kept, gone = without(t, x, [dim])
    t.labels.freeze(flat(gone), f"{t.where} picks channels by computed positions")
    ours = Value((*x.shape[: dim % x.ndim], 1, *x.shape[dim % x.ndim + 1 :]), kept)
    return x.like(t.shape, met(t, [ours, positions], "picks by"))


def _at_zero(args: Sequence[Any]) -> list[Any]:
    """The arguments with all computed positions 0, which will do for labels that are constant along them."""

    def zeros(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [zeros(a) for a in argument]
        return torch.zeros(argument.shape, dtype=torch.int64) if isinstance(argument, Value) else argument

    return [zeros(a) for a in args]


@rule("aten.embedding")
def embedding(t: Tracer, table: Value, index: Value, *_: Any) -> Value:
    """Every row of the table is one input's channels."""
    kept, gone = without(t, table, [0])
    t.labels.freeze(flat((*gone, *index.fields)), f"{t.where} looks them up")
    return Value(t.shape, tuple(along(f.reshape(-1), len(t.shape) - 1, len(t.shape)) for f in kept))


@rule(*aten("chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split"))
def split(t: Tracer, x: Value, *args: Any, **kwargs: Any) -> tuple[Value, ...]:
    """Equal parts shrink alike in a module, whose forward says how many; written sizes count channels."""
    position = 0 if t.name == "aten.unbind" else 1
    dim = kwargs.get("dim", args[position] if len(args) > position else 0) % x.ndim
    for field in x.on(dim):
        _tie_parts(t, field, dim)
    parts: list[list[Tensor]] = [[] for _ in t.shapes]
    for field in x.fields:
        for part, moved in zip(parts, t.target(field.expand(x.shape), *args, **kwargs), strict=True):
            part.append(compact(moved))
            if t.name != "aten.unbind":
                _part(t, field, part[-1], dim)
    return tuple(x.like(shape, fields) for shape, fields in zip(t.shapes, parts, strict=True))


def _tie_parts(t: Tracer, field: Tensor, dim: int) -> None:
    if t.name == "aten.unbind":
        if len(support(field)) > 1:
            t.labels.unify(field.narrow(dim, 0, 1), field)
        else:
            t.labels.freeze(field, f"{t.where} unbinds the axis that they lie on")
        return
    sizes = [shape[dim] for shape in t.shapes]
    written = t.node.args[1] if len(t.node.args) > 1 else None
    if isinstance(written, list | tuple) and t.name == "aten.tensor_split":
        t.labels.freeze(field, f"{t.where} splits them at positions written in its forward")
        return
    if isinstance(written, list | tuple):
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            t.spell((1, number), field, dim, (start, start + size))
    if len(set(sizes)) == 1 and (t.form == "module" or not isinstance(written, list | tuple)):
        parts = field.unflatten(dim, (len(sizes), sizes[0]))
        t.labels.unify(parts.narrow(dim, 0, 1), parts)
        if t.name in ("aten.split", "aten.unsafe_split"):
            t.spell((1,), field, dim, (0, sizes[0]))
    elif not isinstance(written, list | tuple):
        t.labels.freeze(field, f"{t.where} splits them into parts that are not equal")


# --------------------------------------------------------------------------------------------- joining and shuffling


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(t: Tracer, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(t.shape)
    tensors = [x for x in tensors if math.prod(x.shape)]  # an empty tensor concatenates with anything
    across = [Value(x.shape, tuple(f for f in x.fields if f.shape[dim] == 1)) for x in tensors]
    others = met(t, [Value((*x.shape[:dim], 1, *x.shape[dim + 1 :]), x.fields) for x in across], "puts them beside")
    zero = all(x.zero for x in tensors)
    if not any(x.on(dim) for x in tensors):
        return Value(t.shape, others, zero)
    pieces = []
    for x in tensors:
        labels = axis_labels(t, x, dim)
        if labels is None:
            labels = t.labels.new(x.shape[dim])
            t.labels.freeze(labels, f"{t.where} concatenates channels that are not the network's own")
        pieces.append(labels)
    return Value(t.shape, (*others, along(torch.cat(pieces), dim, len(t.shape))), zero)


PADS = "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d"


@rule(*aten(PADS), "aten.replication_pad3d")
def pad(t: Tracer, x: Value, widths: Sequence[int], *rest: Any, **__: Any) -> Value:
    """Spatial padding belongs to the channel it pads; padding of channels makes channels that are nobody's."""
    mode = (*rest, "constant")[0] if t.name == "aten.pad" else t.name
    fields = []
    for field in x.fields:
        axes = [a for a in support(field) if any(_widths(widths, x.ndim, a))]
        if not axes:
            fields.append(field)
        elif mode not in ("constant", "aten.constant_pad_nd") and not isinstance(mode, int | float):
            t.labels.freeze(field, f"{t.where} pads the axis that they lie on with copies of them")
        elif support(field) == (axes[0],):
            fields.append(_pad_channels(t, field, axes[0], _widths(widths, x.ndim, axes[0])))
        else:
            kept, gone = without(t, Value(x.shape, (field,)), axes)
            t.labels.freeze(flat(gone), f"{t.where} pads several axes on which they lie")
            fields += kept
    filled = [value for value in rest if isinstance(value, int | float)]
    return Value(t.shape, tuple(fields), x.zero and not any(filled))


def _widths(widths: Sequence[int], ndim: int, axis: int) -> tuple[int, int]:
    start = 2 * (ndim - 1 - axis)
    return (widths[start], widths[start + 1]) if start + 1 < len(widths) else (0, 0)


def _pad_channels(t: Tracer, field: Tensor, axis: int, widths: tuple[int, int]) -> Tensor:
    """New channels before and after; a negative width crops instead."""
    labels = field.reshape(-1)
    first = 2 * (field.ndim - 1 - axis)
    before, after = (t.labels.new(max(width, 0)) for width in widths)
    cropped, ending = max(-widths[0], 0), len(labels) - max(-widths[1], 0)
    padded = torch.cat([before, labels[cropped:ending], after])
    if len(before):
        t.spell((1, first), padded, span=(0, len(before)))
    if len(after):
        t.spell((1, first + 1), padded, span=(len(padded) - len(after), len(padded)))
    if cropped:
        t.spell((1, first), labels, span=(0, cropped), sign=-1)
    if ending < len(labels):
        t.spell((1, first + 1), labels, span=(ending, len(labels)), sign=-1)
    return _part(t, field, along(padded, axis, field.ndim), axis)


@rule("aten.pixel_shuffle")
def pixel_shuffle(t: Tracer, x: Value, factor: int) -> Value:
    """The r² channels that become one go together."""
    fields = []
    for field in x.fields:
        moved = executed(t, x, field, [factor], {})
        channels = moved.narrow(-1, 0, 1).narrow(-2, 0, 1)
        t.labels.unify(channels, moved)
        fields.append(_part(t, field, compact(channels), x.ndim - 3))
    return x.like(t.shape, fields)


@rule("aten.pixel_unshuffle")
def pixel_unshuffle(t: Tracer, x: Value, factor: int) -> Value:
    return x.like(t.shape, [executed(t, x, f, [factor], {}) for f in x.fields])


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(t: Tracer, x: Value, groups: int) -> Value:
    fields = []
    for field in x.fields:
        if field.shape[1] > 1:
            alike(t, field.movedim(1, 0).reshape(x.shape[1], -1)[:, 0], groups)
        fields.append(executed(t, x, field, [groups], {}))
    return x.like(t.shape, fields)
