"""When the tensors of a captured graph are made and read last, and which channels their elements belong to."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from convpare.graph.labels import Value, support
from convpare.graph.memory import Buffer, Memory


def memory_of(
    values: Mapping[Node, Any], units_of: Callable[[Tensor], np.ndarray], held: Collection[Node],
    applied: Mapping[Node, str],
) -> Memory:  # fmt: skip
    """The buffers of one captured graph.

    Args:
        values: what is known of the output of each node, in the order of the graph.
        units_of: from labels to units, of their shape.
        held: weights and constants, which are there all the time.
        applied: the weight of each node that is a call of a layer.
    """
    nodes = list(values)
    number = {node: n for n, node in enumerate(nodes)}
    storage = {node: _storage(node) for node in nodes}
    permanent = {storage[node] for node in held}
    first: dict[int, Node] = {}
    dies: dict[int, int] = {}
    for node in nodes:
        key = storage[node]
        if key is None or key in permanent:
            continue
        first.setdefault(key, node)
        dies[key] = max([dies.get(key, 0), number[node], *(number[user] for user in node.users if user in number)])
    buffers = []
    for key, node in first.items():
        size, factors = _sized(node, values[node], units_of)
        buffers.append(Buffer(size, factors, number[_maker(node)], dies[key]))
    calls: dict[str, tuple[tuple[int, int], ...]] = {}
    for node, name in applied.items():
        calls[name] = (*calls.get(name, ()), (number[node], node.meta["val"].element_size()))
    return Memory(len(nodes), tuple(buffers), calls)


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _maker(node: Node) -> Node:
    """The operator that fills a node's buffer: of one of several outputs, the one that has them all."""
    parent = node.args[0] if node.args else None
    several = isinstance(parent, Node) and not isinstance(parent.meta.get("val"), Tensor)
    return parent if several and isinstance(parent, Node) else node


def _sized(node: Node, value: object, units_of: Callable[[Tensor], np.ndarray]) -> tuple[float, tuple[np.ndarray, ...]]:
    """Bytes of one element along the factors, and the factors."""
    tensor = node.meta["val"]
    fields = list(value.fields) if isinstance(value, Value) else []
    factors = tuple(units for units in (_joint(part, units_of) for part in _apart(fields)) if (units >= 0).any())
    whole = float(np.prod([units.shape[1] for units in factors]))
    return tensor.untyped_storage().nbytes() / whole, factors


def _apart(fields: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Fields by the axes along which they vary: those that share one come together."""
    parts: list[tuple[set[int], list[Tensor]]] = []
    for labels in fields:
        axes, mine = set(support(labels)), [labels]
        for part in [p for p in parts if p[0] & axes]:
            parts.remove(part)
            axes, mine = axes | part[0], [*part[1], *mine]
        parts.append((axes, mine))
    return (mine for _, mine in parts)


def _joint(fields: Sequence[Tensor], units_of: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    """The units of every element along the axes of some fields, (conditions, elements), no condition twice."""
    if len(fields) == 1:
        return units_of(fields[0]).reshape(1, -1)
    shape = np.broadcast_shapes(*(tuple(labels.shape) for labels in fields))
    rows = [np.broadcast_to(units_of(labels), shape).reshape(-1) for labels in fields]
    return np.unique(np.stack(rows), axis=0)
