"""Operators that work element by element."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convpare.graph.labels import Value, support
from convpare.graph.rules.common import without
from convpare.graph.rules.registry import aten, rule
from convpare.graph.tracer import Tracer

ZERO_STAYS = """relu relu_ relu6 hardtanh hardtanh_ silu silu_ hardswish hardswish_ gelu elu elu_ celu selu selu_
leaky_relu leaky_relu_ mish mish_ tanh tanh_ sqrt abs neg square erf sin dropout dropout_ feature_dropout alpha_dropout
contiguous clone detach alias to _to_copy type_as lift_fresh_copy zeros_like floor round hardshrink softshrink identity
softsign nan_to_num rrelu"""
ZERO_MOVES = """sigmoid sigmoid_ hardsigmoid hardsigmoid_ softplus exp log rsqrt cos reciprocal bernoulli ones_like
logical_not bitwise_not threshold log_sigmoid isnan full_like rand_like randn_like log1p acos"""


def _unary(zero: bool) -> Any:
    def unary(t: Tracer, x: Value, *_: Any, **__: Any) -> Value:
        return Value(t.shape, x.fields, zero=zero and x.zero)

    return unary


rule(*aten(ZERO_STAYS))(_unary(True))
rule(*aten(ZERO_MOVES))(_unary(False))


NARY = """add add_ sub sub_ rsub mul mul_ div div_ true_divide pow pow_ maximum minimum atan2 where lerp addcmul addcdiv
eq ne lt le gt ge logical_and logical_or copy copy_ masked_fill masked_fill_ fmod remainder clamp clamp_
clamp_min clamp_min_ clamp_max clamp_max_ bitwise_and bitwise_or floor_divide"""


@rule(*aten(NARY))
def pointwise(t: Tracer, *args: Any, **kwargs: Any) -> Value:
    """Operands that meet element by element have the same channels."""
    operands = [aligned(a, t.shape) for a in (*args, *kwargs.values()) if isinstance(a, Value)]
    return Value(t.shape, met(t, operands, "combines them with"), _zero(t.name, args))


def met(t: Tracer, operands: Sequence[Value], says: str) -> tuple[Tensor, ...]:
    """The fields of tensors that lie upon each other (broadcast): coupled where they meet, frozen beside fixed ones."""
    fields: list[Tensor] = []
    for number, operand in enumerate(operands):
        others = [*operands[:number], *operands[number + 1 :]]
        for field in operand.fields:
            lonely = [a for a in support(field) if any(o.shape[a] > 1 and not o.on(a) for o in others)]
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


def _zero(name: str, args: Sequence[Any]) -> bool:
    """Whether a removed channel is zero after the operator if it is before."""
    kind = name.removeprefix("aten.").removesuffix("_")
    zeros = [x.zero if isinstance(x, Value) else x == 0 for x in args if isinstance(x, Value | int | float)]
    if kind in ("add", "sub", "rsub"):
        return all(zeros[:2])
    if kind == "mul":
        return any(isinstance(x, Value) and x.zero for x in args)
    if kind in ("div", "true_divide", "fmod", "remainder"):
        return zeros[0]
    if kind == "pow":
        return zeros[0] and isinstance(args[1], int | float) and args[1] > 0
    if kind in ("maximum", "minimum", "lerp"):
        return all(zeros[:2])
    return kind in ("where", "copy") and all(isinstance(x, Value) and x.zero for x in args[1:])


@rule("aten.stack")
def stack(t: Tracer, tensors: Sequence[Value], dim: int = 0) -> Value:
    fields = met(t, list(tensors), "puts them beside")
    return Value(t.shape, tuple(f.unsqueeze(dim) for f in fields), all(x.zero for x in tensors))
