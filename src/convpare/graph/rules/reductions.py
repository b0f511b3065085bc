"""Pooling, resizing, and reductions of whole axes."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convpare.graph.labels import Value
from convpare.graph.rules.common import flat, squeezed, without
from convpare.graph.rules.pointwise import aligned, met
from convpare.graph.rules.registry import Rule, aten, rule
from convpare.graph.tracer import Tracer

POOLS = {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d",
    2: """max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d
          upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa max_pool2d_with_indices
          _adaptive_avg_pool2d""",
    3: """max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d upsample_trilinear3d
          max_pool3d_with_indices _adaptive_avg_pool3d""",
}


def _spatial(axes: int) -> Rule:
    def spatial(t: Tracer, x: Value, *_: Any, **__: Any) -> Value | tuple[Value, ...]:
        last = list(range(x.ndim - axes, x.ndim))
        t.freeze_axes(x, last, f"{t.where} pools or resizes the axis that they lie on")
        if isinstance(t.node.meta["val"], list | tuple):  # values and indices
            return tuple(x.like(shape, x.off(last)) for shape in t.shapes)
        return x.like(t.shape, x.off(last))

    return spatial


for _axes, _names in POOLS.items():
    rule(*aten(_names))(_spatial(_axes))


@rule(*aten("mean sum amax amin var std prod any all argmax argmin cumsum logsumexp"))
def reduction(t: Tracer, x: Value, dim: Any = None, *_: Any, **options: Any) -> Value:
    if isinstance(dim, bool):  # var(x, unbiased) and std(x, unbiased) have no dimensions
        dim = None
    return _reduced(t, x, options.get("dim", dim), t.shape)


@rule("aten.linalg_vector_norm", "aten.norm")
def vector_norm(t: Tracer, x: Value, order: Any = 2, dim: Any = None, *_: Any, **options: Any) -> Value:
    if not isinstance(order, int | float) or order <= 0:
        t.labels.freeze(flat(x.fields), f"{t.where} of order {order} takes zeros into account")
    return _reduced(t, x, options.get("dim", dim), t.shape)


@rule(*aten("max min median sort topk cummax"))
def extremes(t: Tracer, x: Value, *args: Any, **options: Any) -> Value | tuple[Value, ...]:
    """`max(x)`, `max(x, dim)` with its indices, `max(x, y)`."""
    if args and isinstance(args[0], Value):
        return Value(t.shape, met(t, [aligned(v, t.shape) for v in (x, args[0])], "combines them with"))
    if not isinstance(t.node.meta["val"], list | tuple):
        return _reduced(t, x, None, t.shape)
    position = 1 if t.name == "aten.topk" else 0
    dim = options.get("dim", args[position] if len(args) > position else -1)
    return tuple(_reduced(t, x, dim, shape) for shape in t.shapes)


EXACT = ("sum", "linalg_vector_norm", "norm")
AVERAGES = ("mean", "var", "std", *EXACT)


def _reduced(t: Tracer, x: Value, dim: Any, shape: Sequence[int]) -> Value:
    """Sums leave zeroed channels out by themselves; averages are by nature others without some of their channels."""
    dims = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(x.ndim))
    kept, gone = without(t, x, dims)
    kind = t.name.removeprefix("aten.")
    if kind not in AVERAGES:
        t.labels.freeze(flat(gone), f"{t.where} reduces over them")
    elif kind in EXACT:
        t.sum_over(flat(gone), x.zero)
    else:
        t.labels.mark_inexact(flat(gone), f"{t.where} averages over them")
    if len(shape) < x.ndim:
        kept = squeezed(kept, dims, x.ndim)
    return Value(tuple(shape), kept, x.zero and kind not in ("logsumexp", "all"))


@rule("aten.im2col")
def im2col(t: Tracer, x: Value, kernel: Sequence[int], *_: Any) -> Value:
    """(…, C, H, W) → (…, C · kernel, positions): every channel becomes as many as the kernel has taps."""
    fields = _image_channels(t, x)
    lines = [f.squeeze(-1) for f in fields]
    return x.like(t.shape, [f.repeat_interleave(math.prod(kernel), -2) if f.shape[-2] > 1 else f for f in lines])


@rule("aten.col2im")
def col2im(t: Tracer, x: Value, size: Sequence[int], kernel: Sequence[int], *_: Any) -> Value:
    """(…, C · kernel, positions) → (…, C, H, W): the taps of a channel go together."""
    kept, gone = without(t, x, [-1])
    t.labels.freeze(flat(gone), f"{t.where} folds the axis that they lie on")
    fields: list[Tensor] = []
    for field in kept:
        taps = field.unflatten(-2, (-1, math.prod(kernel) if field.shape[-2] > 1 else 1))
        t.labels.unify(taps.narrow(-2, 0, 1), taps)
        fields.append(taps.select(-2, 0).unsqueeze(-1))
    return x.like(t.shape, fields)


def _image_channels(t: Tracer, x: Value) -> tuple[Tensor, ...]:
    kept, gone = without(t, x, [-1, -2])
    t.labels.freeze(flat(gone), f"{t.where} unfolds the axis that they lie on")
    return kept
