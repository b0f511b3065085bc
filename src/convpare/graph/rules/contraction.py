"""Products of activations: matmul and its kin, einsum, attention."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convpare.graph.labels import Value, support
from convpare.graph.rules.common import flat, without
from convpare.graph.rules.pointwise import aligned, met
from convpare.graph.rules.registry import rule
from convpare.graph.tracer import Tracer


def contract(t: Tracer, operands: Sequence[tuple[str, Value]], out: str) -> Value:
    """The product of tensors whose axes bear letters, summed over the letters that `out` has not.

    Channels on a summed axis are coupled over all operands that have it, and a zeroed channel adds nothing. Channels on
    several axes at once (heads × channels of a head) live on where the result has them: heads go as a whole.
    """
    letters = list(dict.fromkeys("".join(axes for axes, _ in operands) + out))
    placed = [_spread(x, axes, letters) for axes, x in operands]
    shared = {n for n, letter in enumerate(letters) if letter in out and sum(letter in a for a, _ in operands) > 1}
    fields = met(t, [_lean(t, x, shared) for x in placed], "multiplies them with")
    shape = [max(x.shape[n] for x in placed) for n in range(len(letters))]
    summed = [n for n, letter in enumerate(letters) if letter not in out]
    kept, gone = without(t, Value(tuple(shape), fields), summed)
    t.sum_over(flat(gone), any(x.zero for x in placed))
    order = [letters.index(letter) for letter in out]
    kept = tuple(f.permute(order + summed).reshape([f.shape[a] for a in order]) for f in kept)
    return Value(tuple(shape[a] for a in order), kept, zero=all(x.zero for x in placed if x.fields))


def _lean(t: Tracer, x: Value, shared: set[int]) -> Value:
    """Where channels lie on axes that operands share and on others, they go alike along the others."""
    fields: list[Tensor] = []
    for field in x.fields:
        hit = set(support(field))
        others = hit - shared if hit & shared else set()
        fields += without(t, Value(x.shape, (field,)), sorted(others))[0]
    return x.like(x.shape, fields)


def _spread(x: Value, axes: str, letters: list[str]) -> Value:
    """A tensor with one axis for each of `letters`, in their order."""
    present = [letter for letter in letters if letter in axes]
    order = [axes.index(letter) for letter in present]
    shape = [x.shape[axes.index(letter)] if letter in axes else 1 for letter in letters]
    fields = []
    for field in x.fields:
        sizes = iter(field.permute(order).shape)
        fields.append(field.permute(order).reshape([next(sizes) if letter in axes else 1 for letter in letters]))
    return x.like(shape, fields)


def _batched(t: Tracer, a: Value, b: Value, last: tuple[str, str, str]) -> Value:
    """`last`: letters of the last axes of both operands and of the result; the axes before are a batch (broadcast)."""
    batch = "".join(chr(ord("A") + n) for n in range(len(t.shape) - len(last[2])))

    def named(x: Value, axes: str) -> tuple[str, Value]:
        count = x.ndim - len(axes)
        return batch[len(batch) - count :] + axes if count else axes, x

    return contract(t, [named(a, last[0]), named(b, last[1])], batch + last[2])


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matmul(t: Tracer, a: Value, b: Value) -> Value:
    left, right = "ik" if a.ndim > 1 else "k", "kj" if b.ndim > 1 else "k"
    return _batched(t, a, b, (left, right, (left + right).replace("k", "")))


@rule("aten.addmm", "aten.baddbmm")
def addmm(t: Tracer, bias: Value, a: Value, b: Value, **_: Any) -> Value:
    product = matmul(t, a, b)
    assert isinstance(product, Value)
    operands = [product, aligned(bias, t.shape)]
    return Value(t.shape, met(t, operands, "adds them to"), product.zero and bias.zero)


@rule("aten.einsum")
def einsum(t: Tracer, equation: str, operands: Sequence[Value], **options: Any) -> Value:
    left, _, out = equation.replace(" ", "").partition("->")
    axes = left.split(",")
    if "..." in equation or "->" not in equation or any(len(set(a)) < len(a) for a in axes):
        for x in operands:
            t.labels.freeze(flat(x.fields), f"{t.where}: {equation!r} is not followed")
        return Value(t.shape)
    return contract(t, list(zip(axes, operands, strict=True)), out)


@rule("aten.scaled_dot_product_attention")
def attention(
    t: Tracer, q: Value, k: Value, v: Value, mask: Value | None = None, *_: Any, scale: float | None = None,
    enable_gqa: bool = False, **__: Any,
) -> Value:  # fmt: skip
    """softmax(q·kᵀ · scale + mask)·v: heads go as a whole; a scale taken from their number changes with them."""
    if enable_gqa:
        t.labels.freeze(flat((*q.fields, *k.fields, *v.fields)), f"{t.where} shares keys among heads")
        return Value(t.shape)
    batch = "".join(chr(ord("A") + n) for n in range(q.ndim - 2))
    if scale is None:
        for x in (q, k):
            _, inside = without(t, x, [-1])
            t.labels.mark_inexact(flat(inside), f"{t.where} scales by their number")
    weights = contract(t, [(batch + "nd", q), (batch + "md", k)], batch + "nm")
    if mask is not None:
        weights = Value(weights.shape, met(t, [weights, aligned(mask, weights.shape)], "masks them with"))
    _, attended = without(t, weights, [-1])
    t.labels.mark_inexact(flat(attended), f"{t.where} normalises over them")
    return contract(t, [(batch + "nm", Value(weights.shape, weights.fields)), (batch + "me", v)], batch + "ne")
