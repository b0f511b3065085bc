"""Feature maps of a group of channels, tapped while a model runs over images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph.structure import Graph, Group, Layer
from convpare.modes import eval_mode

TAPS = ("activation", "conv")


@dataclass(frozen=True)
class Tap:
    """Where the maps of a group are read: the input or the output of a layer, and which of its channels they are.

    `channels` has shape (channels of the group, copies): a channel of the group may stand at several places.
    """

    group: str
    layer: str
    reads_input: bool
    channels: np.ndarray

    def maps(self, tensor: Tensor, kind: str) -> Tensor:
        """(n, channels, *spatial) of a layer's input or output; copies are laid side by side, (n, channels, positions)."""
        if kind == "linear" and tensor.ndim > 2:
            tensor = tensor.movedim(-1, 1)
        index = torch.as_tensor(self.channels, device=tensor.device)
        if index.shape[1] == 1:
            return tensor.index_select(1, index[:, 0])
        return tensor[:, index].flatten(2)


def taps_of(graph: Graph, group: Group, tap: str) -> list[Tap]:
    """Where to read the maps of a group.

    "activation": what the layers that read the group see, after normalisation and nonlinearity; readers whose
    maps have no spatial extent (a linear layer after global pooling) only where there are no others. "conv": what its
    layers put out, before normalisation.

    Raises:
        ConvpareError: there is no such tap, or nothing that can be tapped.
    """
    if tap not in TAPS:
        raise ConvpareError(f"no tap {tap!r}; choose one of {', '.join(TAPS)}")
    if tap == "conv":
        return [_tap(graph, group, graph.layer(name), reads_input=False) for name in group.producers]
    depthwise = [n for n in group.producers if graph.is_depthwise(graph.layer(n))]
    names = [*depthwise, *(n for n in group.consumers if n not in depthwise)]
    convolutions = [n for n in names if graph.layer(n).kind != "linear"]
    found = [_tap(graph, group, graph.layer(name), reads_input=True) for name in convolutions or names]
    return found or [_tap(graph, group, graph.layer(name), reads_input=False) for name in group.producers]


def _tap(graph: Graph, group: Group, layer: Layer, *, reads_input: bool) -> Tap:
    units = graph.channel_units(layer, reads_input=reads_input)
    order = np.argsort(units, kind="stable")
    mine = order[np.isin(units[order], np.arange(group.start, group.start + group.channels))]
    return Tap(group.name, layer.name, reads_input, mine.reshape(group.channels, -1))


@contextmanager
def listening(model: nn.Module, graph: Graph, taps: Sequence[Tap], heard: Callable[[Tap, Tensor], None]) -> Iterator[None]:
    """Call `heard(tap, maps)` whenever a tapped layer of `model` runs. The hooks are gone after the block."""
    handles = []
    try:
        for tap in taps:
            module = model.get_submodule(tap.layer)
            kind = graph.layer(tap.layer).kind
            if tap.reads_input:
                handles.append(module.register_forward_pre_hook(
                    lambda _, inputs, tap=tap, kind=kind: heard(tap, tap.maps(inputs[0].detach(), kind))))  # fmt: skip
            else:
                handles.append(module.register_forward_hook(
                    lambda _, __, output, tap=tap, kind=kind: heard(tap, tap.maps(output.detach(), kind))))  # fmt: skip
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, images: Tensor, batch_size: int = 32) -> None:
    """Run `model` over `images` (n, …) in evaluation mode without gradients, for its hooks' sake."""
    device = next((p.device for p in model.parameters()), images.device)
    with eval_mode(model), torch.no_grad():
        for batch in images.split(batch_size):
            model(batch.to(device))
