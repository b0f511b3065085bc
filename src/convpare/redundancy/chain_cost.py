"""What the chain of two convolutions costs that realises a kernel of low rank across a cut (arXiv 2403.14379)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from convpare.graph.structure import Extent
from convpare.redundancy.cuts import SPATIAL, Cut, Kernel


@dataclass(frozen=True)
class ChainCost:
    """Two plain layers in place of one.

    Attributes:
        rank: over all blocks of the unfolding; a grouped convolution has the same rank in every group.
        form: the two layers, as kernel size and channels.
        params: weights of both, without the bias.
        macs: of both, for the layer's calls.
    """

    rank: int
    form: str
    params: int
    macs: int

    def to_json(self) -> dict[str, Any]:
        return {"rank": self.rank, "form": self.form, "params": self.params, "macs": self.macs}


def chain_cost(kernel: Kernel, cut: Cut, rank: int, extents: Sequence[Extent], transposed: bool = False) -> ChainCost:
    """The cost of the chain for a rank across a cut.

    Where the cut splits o from i, the first layer maps C_i to χ channels with the spatial indices on i's side, the
    second χ to C_o with those on o's side: o|ihw is k×k then 1×1, oh|iw is 1×k then k×1. Where o and i stay together,
    a depthwise layer applies the other side's χ atoms to every input channel, and the second layer mixes the χ C_i maps
    with what spatial indices are left: oi|hw is depthwise k×k then 1×1. Each layer strides along its own spatial
    indices, so that maps between the two have the input's size along the second's.
    """
    sizes, groups = kernel.sizes, kernel.groups
    letters = SPATIAL[kernel.dimensions]
    if cut.splits_channels:
        rank = groups * math.ceil(rank / groups)
        first = cut.left if "i" in cut.left else cut.right
        weights = (rank * sizes["i"] // groups, rank * sizes["o"] // groups)
        middle = rank
    else:
        first = cut.right if "o" in cut.left else cut.left
        weights = (rank * sizes["i"], rank * sizes["i"] * sizes["o"] // groups)
        middle = rank * sizes["i"]
    kernels = [tuple(sizes[c] if (c in first) == mine else 1 for c in letters) for mine in (True, False)]
    params = [w * math.prod(k) for w, k in zip(weights, kernels, strict=True)]
    macs = 0
    for extent in extents:
        between = [b if c in first else a for c, a, b in zip(letters, extent.into, extent.out, strict=True)]
        places = (extent.into, between) if transposed else (between, extent.out)
        macs += extent.batch * sum(p * math.prod(at) for p, at in zip(params, places, strict=True))
    widths = (sizes["i"], middle, sizes["o"])
    form = ", ".join(_layer(k, *widths[n : n + 2]) for n, k in enumerate(kernels))
    return ChainCost(rank, form, sum(params), macs)


def dense_cost(kernel: Kernel, extents: Sequence[Extent], transposed: bool = False) -> ChainCost:
    """The layer as it is."""
    sizes = kernel.sizes
    lengths = tuple(sizes[c] for c in SPATIAL[kernel.dimensions])
    places = sum(e.batch * math.prod(e.into if transposed else e.out) for e in extents)
    params = kernel.tensor.numel()
    return ChainCost(0, _layer(lengths, sizes["i"], sizes["o"]), params, params * places)


def _layer(lengths: Sequence[int], into: int, out: int) -> str:
    return f"{'×'.join(map(str, lengths)) or 'linear'} {into}→{out}"
