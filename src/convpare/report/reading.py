"""Values of JSON that anybody may have written, taken for what they should be or refused (`MALFORMED`)."""

from collections.abc import Callable
from typing import Any, TypeVar

MALFORMED = (KeyError, IndexError, TypeError, ValueError, ArithmeticError)
LARGEST = 2**63  # of a count that is believed, and of a number's absolute value

T = TypeVar("T")


def mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__} where an object is expected")
    return value


def items(value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"a {type(value).__name__} where a list is expected")
    return list(value)


def text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} where a text is expected")
    return value


def texts(value: object) -> tuple[str, ...]:
    return tuple(text(item) for item in items(value))


def count(value: object) -> int:
    if type(value) is not int or not 0 <= value < LARGEST:
        raise ValueError(f"{str(value)[:30]} where a count is expected")
    return value


def counts(value: object) -> tuple[int, ...]:
    return tuple(count(item) for item in items(value))


def real(value: object) -> float:
    if not isinstance(value, int | float) or not abs(value) < LARGEST:  # NaN is not below it
        raise ValueError(f"{str(value)[:30]} where a number is expected")
    return float(value)


def share(value: object) -> float:
    number = real(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{number} where a share is expected")
    return number


def maybe(read: Callable[[object], T], value: object) -> T | None:
    return None if value is None else read(value)
