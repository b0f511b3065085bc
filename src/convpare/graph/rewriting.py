"""The numbers in the arguments of a node, with those that count channels set anew."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from convpare.graph.structure import Path, Rewrite


def by_node(rewrites: Iterable[Rewrite]) -> dict[str, list[Rewrite]]:
    """The rewrites of each node, by its name."""
    found: dict[str, list[Rewrite]] = {}
    for rewrite in rewrites:
        found.setdefault(rewrite.node, []).append(rewrite)
    return found


def rewritten(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], rewrites: Iterable[Rewrite], keep: np.ndarray
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node under the mask `keep` (channels,)."""
    for rewrite in rewrites:
        args, kwargs = replaced(args, kwargs, rewrite.path, partial(_number, rewrite, keep))
    return args, dict(kwargs)


def _number(rewrite: Rewrite, keep: np.ndarray, _: int) -> int:
    return rewrite.count(keep)


def replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], path: Path, change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node with the value at `path` changed."""
    if isinstance(path[0], str):
        return args, {**kwargs, path[0]: _changed(kwargs[path[0]], path[1:], change)}
    return tuple(_changed(a, path[1:], change) if n == path[0] else a for n, a in enumerate(args)), dict(kwargs)


def _changed(value: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(value)
    items = list(value)
    items[int(path[0])] = _changed(items[int(path[0])], path[1:], change)
    return items
