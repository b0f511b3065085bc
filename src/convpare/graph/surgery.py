"""Carry out removals on the eager module: slice parameters and buffers, and keep the modules' attributes true."""

import copy
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from convpare.graph.graphform import graph_module
from convpare.graph.mending import set_mended
from convpare.graph.structure import Graph
from convpare.graph.sync import sync_attributes
from convpare.graph.units import staying


def removed(model: nn.Module, graph: Graph, keep: np.ndarray) -> nn.Module:
    """A copy of `model` without the channels that the mask `keep` (channels,) drops; the given model is untouched.

    In the module form: same class, same forward; in the graph form: a module of its own (`graph_module`). Contiguous
    parameters on the same device, `requires_grad` as before, no gradients.
    """
    if graph.form == "graph":
        return graph_module(model, graph, keep)
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
        mask = staying(mend.units, keep)
        if not mask.all():
            mend.mender(model.get_submodule(mend.module), mask)
    for number in graph.attributes:
        set_mended(model.get_submodule(number.module), number.name, number(keep))


def zeroed(model: nn.Module, graph: Graph, keep: np.ndarray) -> nn.Module:
    """A copy of `model` of the same shape, zero wherever a dropped channel is borne. The oracle for `removed`."""
    dense = graph_module(model, graph, graph.keep_all()) if graph.form == "graph" else copy.deepcopy(model)
    tensors = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    with torch.no_grad():
        for (name, dim), units in graph.units.items():
            gone = np.flatnonzero((units >= 0) & ~keep[units])
            if len(gone) and name in tensors and (name, dim) not in graph.spared:
                tensors[name].index_fill_(dim, torch.as_tensor(gone, device=tensors[name].device), 0)
    return dense


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
