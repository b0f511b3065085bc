"""How much of every kernel of a network repeats itself, across all its cuts and with no data (arXiv 2403.14379)."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from convpare.graph.structure import Graph, Layer
from convpare.redundancy.chain_cost import ChainCost, chain_cost, dense_cost
from convpare.redundancy.cuts import Cut, Kernel, Spectrum, spectra

ENERGY = 0.99


@dataclass(frozen=True)
class KernelRedundancy:
    """One layer's kernel.

    Attributes:
        out_channels: K.
        spectra: across every cut, by its name.
        dense: what the layer costs as it is.
        chains: by cut, the two layers that keep the asked share of the squared norm.
        cut: that of the chain with the fewest MACs; None where none has fewer than the layer.
    """

    out_channels: int
    spectra: Mapping[str, Spectrum]
    dense: ChainCost
    chains: Mapping[str, ChainCost]
    cut: str | None

    @property
    def least_macs(self) -> int:
        """MACs of the cheapest chain, or of the layer where none is cheaper."""
        return self.dense.macs if self.cut is None else self.chains[self.cut].macs

    @property
    def saved(self) -> float:
        """The share of the layer's MACs that goes with the cheapest chain."""
        return 1 - self.least_macs / self.dense.macs

    @property
    def output_rank(self) -> int:
        """The rank across the cut o|ihw that keeps the asked share."""
        return self.chains[next(iter(self.spectra))].rank

    @property
    def k_over_rank(self) -> float:
        """K/R of a trained dense layer: its output channels over the rank that keeps the asked share across o|ihw."""
        return self.out_channels / max(self.output_rank, 1)

    def to_json(self) -> dict[str, Any]:
        return {
            "cuts": {name: {**s.to_json(), "chain": self.chains[name].to_json()} for name, s in self.spectra.items()},
            "k_over_rank": self.k_over_rank,
            "best_cut": self.cut,
            "least_macs": self.least_macs,
        }


def kernel_of(model: nn.Module, graph: Graph, layer: Layer) -> Kernel:
    """A layer's weight as a kernel. Raises ConvpareError if it holds NaN or infinity."""
    owner, _, name = layer.weight.rpartition(".")
    weight = getattr(model.get_submodule(owner), name)
    return Kernel.of(weight, layer.groups, layer.kind == "conv_transpose")


def measure_kernels(
    model: nn.Module, graph: Graph, energy: float = ENERGY, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, KernelRedundancy]:
    """The redundancy of every layer whose weight is a parameter as it stands, by the layer's name.

    Layers are measured side by side, each on one thread: the eigenvalues of one matrix gain little from more.

    Args:
        energy: the share of a kernel's squared norm that a chain must keep; 0.99 is a relative error of 10 %.
        on_progress: called with (layers done, layers).

    Raises:
        ConvpareError: a weight holds NaN or infinity, or `energy` is not in (0, 1].
    """
    kernels = {layer.name: kernel_of(model, graph, layer) for layer in graph.layers if not layer.computed}
    largest_first = sorted(kernels, key=lambda name: -kernels[name].tensor.numel())
    threads = torch.get_num_threads()
    found = {}
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            measure = partial(measure_kernel, energy=energy)
            work = {pool.submit(measure, kernels[name], graph.layer(name)): name for name in largest_first}
            for done, future in enumerate(as_completed(work), 1):
                found[work[future]] = future.result()
                if on_progress is not None:
                    on_progress(done, len(kernels))
    finally:
        torch.set_num_threads(threads)
    return {name: found[name] for name in kernels}


def measure_kernel(kernel: Kernel, layer: Layer, energy: float = ENERGY) -> KernelRedundancy:
    """The redundancy of one kernel, with costs for the calls of `layer`."""
    transposed = layer.kind == "conv_transpose"
    found = spectra(kernel)
    dense = dense_cost(kernel, layer.extents, transposed)
    chains = {
        name: chain_cost(kernel, Cut.parse(name), s.rank_at(energy), layer.extents, transposed)
        for name, s in found.items()
    }
    best = min(chains, key=lambda name: chains[name].macs)
    return KernelRedundancy(kernel.sizes["o"], found, dense, chains, best if chains[best].macs < dense.macs else None)
