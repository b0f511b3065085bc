"""The latency of a network for any choice of channels and chains: its layers' times, and the rest."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from convpare.errors import ConvpareError
from convpare.factorize.chain import build, kernel_of, layout_of
from convpare.factorize.edit import Factorize, kernel_at
from convpare.factorize.forms import get_form
from convpare.graph.structure import Extent, Graph, Layer
from convpare.modes import eval_mode
from convpare.planning.cost import out_channels
from convpare.planning.layer_times import LayerTimes, Signature, Target
from convpare.redundancy.cuts import Kernel
from convpare.runtimes import ready, torch_threads
from convpare.timing import in_turn

SECONDS = 2.0  # that the whole network is timed


@dataclass
class NetworkTimes:
    """Milliseconds of one network's layers, as they are or as chains, with any channels.

    What layers take apart from each other does not add up to what the network takes: normalisation, activations and
    the like are the rest, which goes with the output elements of the layers; where layers alone are slower than
    together, their times are scaled down. So the network as it is has the time that was measured.

    Attributes:
        whole: milliseconds of the network as it is, measured.
        untimed: layers that are no plain modules; their times are in the rest.
    """

    model: nn.Module
    graph: Graph
    times: LayerTimes
    whole: float = field(init=False)
    untimed: tuple[str, ...] = field(init=False)
    _known: dict[tuple[str, str, tuple[int, ...], int, int], float] = field(init=False, default_factory=dict)
    _signatures: dict[tuple[str, str, Extent], tuple[Signature, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = {layer.name: _plain(self.model, layer) for layer in self.graph.layers}
        self.untimed = tuple(name for name, module in self._modules.items() if module is None)
        (self.whole,) = timed_beside([self.model], self.graph.inputs, self.times.target)
        sizes = {layer.name: _sizes(self.graph, layer, self.graph.keep_all()) for layer in self.graph.layers}
        alone = sum(self.of(layer, None, *sizes[layer.name], scaled=False) for layer in self.timed)
        self.scale = min(1.0, self.whole / alone) if alone else 1.0
        self.rest = self.whole - self.scale * alone
        self._elements = self._elements_left(self.graph.keep_all())

    @property
    def timed(self) -> list[Layer]:
        """The layers whose times are known."""
        return [layer for layer in self.graph.layers if self._modules[layer.name] is not None]

    def of(
        self, layer: Layer, chain: tuple[str, tuple[int, ...]] | None, into: int, out: int, *, scaled: bool = True
    ) -> float:
        """Milliseconds of a layer, or of the chain (form, ranks) in its place.

        Args:
            into: the size of the weight's axis of inputs.
            out: likewise of outputs.
        """
        form, ranks = chain or ("", ())
        key = layer.name, form, ranks, into, out
        if key not in self._known:
            self._known[key] = sum(
                self.times.milliseconds(*link) for extent in layer.extents
                for link in self._linked(layer, form, ranks, into, out, extent)
            )  # fmt: skip
        return (self.scale if scaled else 1.0) * self._known[key]

    def predicted(self, keep: np.ndarray, factorizations: tuple[Factorize, ...] = ()) -> float:
        """Milliseconds of the network under the mask `keep` (channels,) with these chains."""
        chains = {edit.layer: (edit.form, edit.ranks) for edit in factorizations}
        layers = sum(self.of(layer, chains.get(layer.name), *_sizes(self.graph, layer, keep)) for layer in self.timed)
        return layers + self.rest * self.rest_share(keep)

    def rest_share(self, keep: np.ndarray) -> float:
        """The layers' output elements under the mask `keep`, as a share of all."""
        return self._elements_left(keep) / max(self._elements, 1)

    def _elements_left(self, keep: np.ndarray) -> int:
        return sum(layer.outputs * out_channels(self.graph, layer, keep) for layer in self.graph.layers)

    def _linked(
        self, layer: Layer, form: str, ranks: tuple[int, ...], into: int, out: int, extent: Extent
    ) -> Iterator[tuple[Signature, int, int]]:
        """The plain layers, with their input and output channels."""
        transposed = layer.kind == "conv_transpose"
        shapes = get_form(form).shapes(kernel_at(self.graph, layer, into, out), ranks, transposed) if form else ()
        signatures = self._signatures_of(layer, form, shapes, extent)
        if form:
            for signature, (groups, o, i, *_) in zip(signatures, shapes, strict=True):
                yield signature, groups * i, groups * o
        elif signatures[0].groups:
            yield signatures[0], *((into, out * layer.groups) if transposed else (into * layer.groups, out))
        else:  # depthwise: along one axis of the weight are channels, along the other the outputs that each has
            yield signatures[0], *((into, into * out) if transposed else (max(out // self._multiplier(layer), 1), out))

    def _multiplier(self, layer: Layer) -> int:
        """How many outputs each channel of a depthwise convolution has."""
        module: Any = self._modules[layer.name]
        return max(int(module.out_channels // module.in_channels), 1)

    def _signatures_of(
        self, layer: Layer, form: str, shapes: tuple[tuple[int, ...], ...], extent: Extent
    ) -> tuple[Signature, ...]:
        """Of a layer or its chain: all but the channels, which are the same for every rank."""
        key = layer.name, form, extent
        if key not in self._signatures:
            module: Any = self._modules[layer.name]
            batch = max(1, round(extent.batch * self.times.target.batch / self.graph.inputs[0][0]))
            if not form:
                self._signatures[key] = (Signature.of(module, batch, extent.into),)
            else:
                links = tuple(Kernel(torch.empty(shape, device="meta")) for shape in shapes)
                layout = layout_of(links, layer.kind == "conv_transpose")
                sizes = [extent.into, *(layout.sizes_after(n, extent) for n in range(len(links) - 1))]
                built = zip(build(module, links), sizes, strict=True)
                self._signatures[key] = tuple(Signature.of(link, batch, size) for link, size in built)
        return self._signatures[key]


def _plain(model: nn.Module, layer: Layer) -> nn.Module | None:
    """A layer's module without its numbers, if it is a plain one."""
    try:
        found = model.get_submodule(layer.name)
        kernel_of(found)
    except (AttributeError, ConvpareError):
        return None
    return copy.deepcopy(found).to("meta")


def _sizes(graph: Graph, layer: Layer, keep: np.ndarray) -> tuple[int, int]:
    """The sizes of a weight's axes of inputs and outputs."""
    return len(graph.kept(layer.into, keep)), len(graph.kept(layer.out, keep))


def timed_beside(
    models: Sequence[nn.Module], inputs: Sequence[tuple[int, ...]], target: Target, seconds: float = SECONDS
) -> list[float]:
    """Median milliseconds of networks in turn, where and how they are to run, on noise in the shapes of `inputs`."""
    generator = torch.Generator().manual_seed(0)
    like = next((p for p in models[0].parameters() if p.is_floating_point()), torch.zeros(1))
    noise = [
        torch.randn((target.batch * shape[0] // inputs[0][0], *shape[1:]), generator=generator).to(like)
        for shape in inputs
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(target.cores))
        for model in models:
            stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        times = in_turn([ready(target.runtime, model, noise) for model in models], seconds, like.device)
    return [float(x) for x in np.median(times, axis=0)]
