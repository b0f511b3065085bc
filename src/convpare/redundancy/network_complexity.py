"""Sample complexity of a whole network beside the numbers that it stores, block by block (arXiv 2112.04857)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from convpare.graph.structure import Graph
from convpare.redundancy.kr import Block


@dataclass(frozen=True)
class Gap:
    """The numbers that a block stores, and its next layer for its channels, and how many of them data must determine.

    With R the rank of the map into the block's K channels and P the weights that the next layer has for one of them,
    K·R + (K - R)·P numbers are superfluous where K > R: exactly, if nothing nonlinear stands behind the block; else
    that is an indicator.
    """

    name: str
    d_naive: int
    d_sample: int


@dataclass(frozen=True)
class NetworkComplexity:
    """d_naive: the weights of all convolutions and linear layers; d_sample: without what the blocks have too many."""

    d_naive: int
    d_sample: int
    blocks: tuple[Gap, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def network_complexity(graph: Graph, blocks: Sequence[Block]) -> NetworkComplexity:
    """The counts of a traced network with these blocks."""
    sizes = {layer.name: math.prod(graph.shapes[layer.weight]) for layer in graph.layers}
    gaps = tuple(_gap(graph, block, sizes) for block in blocks)
    naive = sum(sizes.values())
    return NetworkComplexity(naive, naive - sum(gap.d_naive - gap.d_sample for gap in gaps), gaps)


def _gap(graph: Graph, block: Block, sizes: Mapping[str, int]) -> Gap:
    following = _weights_per_channel(graph, block.layers[-1])
    stored = sum(sizes.get(name, 0) for name in block.layers) + block.k * following
    superfluous = block.k * block.r + (block.k - block.r) * following if block.k > block.r else 0
    return Gap(block.name, stored, stored - superfluous)


def _weights_per_channel(graph: Graph, layer: str) -> int:
    """P: what the next layer that reads the channels of `layer` stores for each of them; 0 for the network's output."""
    order = [x.name for x in graph.layers]
    for group in graph.groups:
        if layer in group.producers:
            depthwise = [name for name in group.producers if graph.is_depthwise(graph.layer(name))]
            later = [n for n in (*group.consumers, *depthwise) if order.index(n) > order.index(layer)]
            if later:
                reader = graph.layer(min(later, key=order.index))
                shape = graph.shapes[reader.weight]
                return math.prod(shape) // (shape[reader.in_axis] * reader.groups)
    return 0
