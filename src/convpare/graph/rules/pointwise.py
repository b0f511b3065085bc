"""Operators that work element by element."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convpare.graph.labels import Value, support
from convpare.graph.rules.common import flat, without
from convpare.graph.rules.registry import aten, rule
from convpare.graph.tracer import Tracer

ZERO_STAYS = """relu relu_ relu6 hardtanh hardtanh_ silu silu_ hardswish hardswish_ gelu elu elu_ celu selu selu_
leaky_relu leaky_relu_ mish mish_ tanh tanh_ sqrt abs neg square erf sin log1p
contiguous clone detach alias to _to_copy type_as lift_fresh_copy zeros_like floor round hardshrink softshrink identity
softsign nan_to_num"""
ZERO_MOVES = """sigmoid sigmoid_ hardsigmoid hardsigmoid_ softplus exp log rsqrt cos reciprocal ones_like
logical_not bitwise_not threshold log_sigmoid isnan full_like acos"""


def _unary(zero: bool) -> Any:
    def unary(t: Tracer, x: Value, *_: Any, **__: Any) -> Value:
        return written(t, Value(t.shape, x.fields, zero=zero and x.zero))

    return unary


rule(*aten(ZERO_STAYS))(_unary(True))
rule(*aten(ZERO_MOVES))(_unary(False))


@rule(*aten("dropout dropout_ feature_dropout feature_dropout_ alpha_dropout rrelu bernoulli rand_like randn_like"))
def random(t: Tracer, x: Value, *args: Any, **__: Any) -> Value:
    """Numbers that are drawn for fewer channels are others; a dropout of the evaluation mode draws none."""
    switched_off = t.name.startswith("aten.rrelu") or (len(args) > 1 and args[1] is False)
    if not switched_off or (t.name == "aten.rrelu" and len(args) > 2 and args[2]):
        t.labels.freeze(flat(x.fields), f"{t.where} draws random numbers for them")
    return Value(t.shape, x.fields, zero=x.zero and switched_off)


NARY = """add add_ sub sub_ rsub mul mul_ div div_ true_divide pow pow_ maximum minimum atan2 where lerp addcmul addcdiv
eq ne lt le gt ge logical_and logical_or copy copy_ masked_fill masked_fill_ fmod remainder clamp clamp_
clamp_min clamp_min_ clamp_max clamp_max_ bitwise_and bitwise_or floor_divide"""


@rule(*aten(NARY))
def pointwise(t: Tracer, *args: Any, **kwargs: Any) -> Value:
    """Operands that meet element by element have the same channels."""
    operands = [aligned(a, t.shape) for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    fields = met(t, operands, "combines them with")
    covered = [x.zero and _axes(x.fields) >= _axes(fields) for x in operands]
    return written(t, Value(t.shape, fields, _zero(t.name, args, covered)))


def written(t: Tracer, out: Value) -> Value:
    """The result of an operator; one that writes in place where zeros were may have written into another tensor."""
    t.spoiled = t.spoiled or (t.name.endswith("_") and not out.zero)
    return out


def _axes(fields: Sequence[Tensor]) -> set[int]:
    return {axis for field in fields for axis in support(field)}


def met(t: Tracer, operands: Sequence[Value], says: str) -> tuple[Tensor, ...]:
    """The fields of tensors that lie upon each other (broadcast): coupled where they meet, frozen beside fixed ones."""
    fields: list[Tensor] = []
    for number, operand in enumerate(operands):
        others = [*operands[:number], *operands[number + 1 :]]
        for field in operand.fields:
            lonely = [a for a in support(field) if any(o.shape[a] > 1 and not o.on(a) for o in others)]
            if not support(field):  # a single channel
                continue
            if len(lonely) == len(support(field)):
                t.labels.freeze(field, f"{t.where} {says} a tensor of fixed size")
                continue
            (lean,), _ = without(t, Value(operand.shape, (field,)), lonely)
            if partners := _overlapping(lean, fields):
                for known in partners:
                    t.labels.unify(known, lean)
            else:
                fields.append(lean)
    return tuple(fields)


def aligned(x: Value, shape: Sequence[int]) -> Value:
    """`x` with leading axes of size 1, as broadcasting adds them."""
    missing = [1] * (len(shape) - x.ndim)
    return x.like((*missing, *x.shape), [f.reshape(*missing, *f.shape) for f in x.fields])


def _overlapping(field: Tensor, fields: Sequence[Tensor]) -> list[Tensor]:
    axes = set(support(field))
    return [f for f in fields if axes & set(support(f))]


def _zero(name: str, args: Sequence[Any], covered: Sequence[bool]) -> bool:
    """Whether a removed channel is zero after the operator; `covered`: whether it is in each of the tensors before."""
    kind = name.removeprefix("aten.").removesuffix("_")
    numbers = [a for a in args[:2] if isinstance(a, int | float)]
    if kind in ("add", "sub", "rsub", "maximum", "minimum", "lerp"):
        return all(covered) and not any(numbers)
    if kind == "mul":
        return any(covered)
    if kind in ("div", "true_divide", "fmod", "remainder"):
        return isinstance(args[0], Value) and covered[0]
    if kind == "pow":
        return isinstance(args[0], Value) and covered[0] and all(n > 0 for n in numbers) and len(numbers) == 1
    return kind in ("where", "copy") and all(covered[1:])


@rule("aten.stack")
def stack(t: Tracer, tensors: Sequence[Value], dim: int = 0) -> Value:
    fields = met(t, list(tensors), "puts them beside")
    return Value(t.shape, tuple(f.unsqueeze(dim) for f in fields), all(x.zero for x in tensors))
