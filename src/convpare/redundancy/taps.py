"""Feature maps of a group of channels, tapped while a model runs over images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
        """(n, channels, *spatial) of a layer's input or output; copies lie side by side, (n, channels, positions)."""
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
    names = [n for n in names if graph.layer(n).weight != n] or names  # others are functional calls
    found = [_tap(graph, group, graph.layer(name), reads_input=True) for name in names]
    extended = [t for t in found if t.channels.shape[1] > 1 or _has_extent(graph, graph.layer(t.layer))]
    return extended or found or [_tap(graph, group, graph.layer(name), reads_input=False) for name in group.producers]


def _tap(graph: Graph, group: Group, layer: Layer, *, reads_input: bool) -> Tap:
    units = graph.channel_units(layer, reads_input=reads_input)
    order = np.argsort(units, kind="stable")
    mine = order[np.isin(units[order], np.arange(group.start, group.start + group.channels))]
    return Tap(group.name, layer.name, reads_input, mine.reshape(group.channels, -1))


def _has_extent(graph: Graph, layer: Layer) -> bool:
    """Whether a layer reads more than one position of an image."""
    return layer.positions > graph.inputs[0][0] or math.prod(graph.shapes[layer.weight][2:]) > 1


def visit(
    model: nn.Module, graph: Graph, taps: Sequence[Tap], images: Tensor, heard: Callable[[int, Tensor], None]
) -> None:
    """Run `model` over `images` and call `heard(number, maps)` whenever the layer of tap `number` runs.

    Raises:
        ConvpareError: a tapped layer is no module, or does not run as one; or the images do not suit the model.
    """
    silent = set(range(len(taps)))

    def hear(number: int, tensor: Tensor) -> None:
        silent.discard(number)
        heard(number, taps[number].maps(tensor.detach(), graph.layer(taps[number].layer).kind))

    handles: list[RemovableHandle] = []
    try:
        for i, tap in enumerate(taps):
            module = module_of(model, tap.layer)
            if tap.reads_input:
                handles.append(module.register_forward_pre_hook(lambda _, inputs, i=i: hear(i, inputs[0])))
            else:
                handles.append(module.register_forward_hook(lambda _, __, output, i=i: hear(i, output)))
        run(model, images)
    finally:
        for handle in handles:
            handle.remove()
    for number in silent:
        raise _no_module(taps[number].layer)


def module_of(model: nn.Module, layer: str) -> nn.Module:
    """The module of a layer.

    Raises:
        ConvpareError: the layer is a functional call with a parameter of its own.
    """
    found: nn.Module | None = dict(model.named_modules(remove_duplicate=False)).get(layer)
    if found is None:
        raise _no_module(layer)
    return found


def _no_module(layer: str) -> ConvpareError:
    return ConvpareError(
        f"layer {layer!r} does not run as a module of its own, so that its feature maps cannot be read; exclude the "
        "groups beside it, or take a criterion that looks at weights alone, such as l2"
    )


def run(model: nn.Module, images: Tensor, batch_size: int = 32) -> None:
    """Run `model` over `images` (n, …) in evaluation mode without gradients, for its hooks' sake.

    Raises:
        ConvpareError: it does not run on them.
    """
    with eval_mode(model), torch.no_grad():
        for batch in torch.split(images, batch_size):
            call(model, suited(batch, model))


def call(model: nn.Module, images: Tensor) -> object:
    """What the model returns for images. Raises ConvpareError if it does not run on them."""
    try:
        return model(images)
    except RuntimeError as error:
        raise ConvpareError(f"the model failed on images of shape {tuple(images.shape)}: {error}") from error


def suited(images: Tensor, model: nn.Module) -> Tensor:
    """The images on the device and in the type of the model's first parameter."""
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.to(like.device, like.dtype)
