"""Numbers in a captured graph that follow the batch: found by capturing once more with one example added."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from convpare.errors import ConvpareError
from convpare.graph.capture import capture
from convpare.graph.normal import normalise
from convpare.graph.structure import Path


def batch_numbers(model: nn.Module, args: tuple[Tensor, ...], program: ExportedProgram) -> frozenset[tuple[str, Path]]:
    """The places in the normalised graph of `program` that hold a multiple of the batch size, the inputs' first axis.

    None are returned where the batch is not the first axis of every input, or the forward depends on it otherwise; the
    graph then serves for batches of this size alone.
    """
    sizes = {len(x) if x.ndim else 0 for x in args}
    if len(sizes) != 1 or not (size := sizes.pop()):
        return frozenset()
    try:
        larger = capture(model, tuple(torch.cat([x, x[:1]]) for x in args))
    except ConvpareError:  # one example more is not what its forward takes
        return frozenset()
    normalise(larger)
    nodes, others = list(program.graph.nodes), list(larger.graph.nodes)
    if [n.target for n in nodes if n.op == "call_function"] != [n.target for n in others if n.op == "call_function"]:
        return frozenset()
    found = set()
    for node, other in zip(nodes, others, strict=True):
        ours, theirs = dict(_numbers(node)), dict(_numbers(other))
        for path, number in ours.items():
            if number != theirs.get(path):
                if number * (size + 1) != theirs.get(path, 0) * size:
                    return frozenset()
                found.add((node.name, path))
    return frozenset(found)


def _numbers(node: Node) -> Iterator[tuple[Path, Any]]:
    """Every number in the arguments of a node, with its place."""

    def walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if isinstance(value, list | tuple):
            for number, item in enumerate(value):
                yield from walk(item, (*path, number))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, value

    yield from walk(node.args, ())
    for key, value in node.kwargs.items():
        yield from walk(value, (key,))
