"""The registry of rules: one function for each kind of operator.

A rule is a function `rule(t, *args, **kwargs) -> Value | tuple[Value, ...]`, registered for the names of the aten
operators that it serves, without overload (`"aten.conv2d"`). Tensors arrive as `Value`, everything else as it stands in
the graph; `t` (a `Tracer`) has `t.labels`, `t.shape` (of the output) and `t.where` (the module, for messages). An
operator without a rule freezes its inputs: nothing is guessed.
"""

from collections.abc import Callable

from convpare.errors import ConvpareError
from convpare.graph.labels import Value

Rule = Callable[..., "Value | tuple[Value, ...] | list[Value]"]
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


def aten(names: str) -> list[str]:
    """`aten.a`, `aten.b` of "a b"."""
    return [f"aten.{name}" for name in names.split()]
