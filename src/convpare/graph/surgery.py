"""Carry out removals on the eager module: slice parameters and buffers, and keep the modules' attributes true."""

import copy
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from convpare.graph.structure import Graph

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def removed(model: nn.Module, graph: Graph, keep: np.ndarray) -> nn.Module:
    """A copy of `model` without the channels that the mask `keep` (channels,) drops; the given model is untouched.

    Same class, same forward, contiguous parameters on the same device, `requires_grad` as before, no gradients.
    """
    small = copy.deepcopy(model)
    remove_(small, graph, keep)
    return small


def remove_(model: nn.Module, graph: Graph, keep: np.ndarray) -> None:
    """As `removed`, in place."""
    changes: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for axis in graph.units:
        kept = graph.kept(axis, keep)
        if len(kept) < graph.shapes[axis[0]][axis[1]]:
            changes[axis[0]][axis[1]] = kept
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in graph.aliases.items():
        names[name].append(alias)
    touched: dict[int, nn.Module] = {}
    for name, kept_by_axis in changes.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        old = getattr(owner, name.rpartition(".")[2])
        new = _sliced(old, kept_by_axis)
        for known in (name, *names[name]):
            place, _, attribute = known.rpartition(".")
            _replace(model.get_submodule(place), attribute, new)
            owner = model.get_submodule(place.partition("parametrizations.")[0].rstrip("."))
            touched[id(owner)] = owner
    for owner in touched.values():
        sync_attributes(owner)
    for mend in graph.mends:
        mask = (mend.units < 0) | keep[mend.units] if len(keep) else mend.units < 0
        if not mask.all():
            mend.mender(model.get_submodule(mend.module), mask)


def zeroed(model: nn.Module, graph: Graph, keep: np.ndarray) -> nn.Module:
    """A copy of `model` of the same shape, zero wherever a dropped channel is borne. The oracle for `removed`."""
    dense = copy.deepcopy(model)
    tensors = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    with torch.no_grad():
        for (name, dim), units in graph.units.items():
            gone = np.flatnonzero((units >= 0) & ~keep[units])
            if len(gone):
                tensors[name].index_fill_(dim, torch.as_tensor(gone, device=tensors[name].device), 0)
    return dense


def sync_attributes(module: nn.Module) -> None:
    """Make `out_channels`, `groups`, `num_features` and their like say what the shapes of the parameters say."""
    if isinstance(module, nn.modules.conv._ConvNd):
        _sync_convolution(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, BATCH_NORMS):
        sized = module.weight if module.weight is not None else module.running_mean
        module.num_features = len(sized)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def mend_features(module: nn.Module, keep: np.ndarray) -> None:
    """A norm without parameters or statistics has no shape to read `num_features` from."""
    module.num_features = int(keep.sum())  # type: ignore[assignment]


def _sync_convolution(module: nn.modules.conv._ConvNd) -> None:
    first, second = module.weight.shape[:2]
    total, own = module.out_channels, module.in_channels
    if module.transposed:
        total, own = own, total
    if own == module.groups > 1:  # a group is one channel, or one with its multiples, and goes as a whole
        module.groups = first // (total // module.groups)
    if module.transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.out_channels, module.in_channels = first, second * module.groups


def _sliced(tensor: Tensor, kept_by_axis: dict[int, np.ndarray]) -> Tensor:
    new = tensor.detach()
    for axis, kept in kept_by_axis.items():
        new = new.index_select(axis, torch.as_tensor(kept, device=tensor.device))
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _replace(owner: nn.Module, name: str, new: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = new  # type: ignore[assignment]
    else:
        owner._buffers[name] = new
