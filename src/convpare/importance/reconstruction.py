"""Second-order selection: which channels can the layers that read them do best without, after compensation?

For a layer that reads x, with weight W and second moment H = E[x xᵀ] of what its kernel sees, dropping the inputs J and
re-fitting the others by least squares costs tr(W_J [(H⁻¹)_JJ]⁻¹ W_Jᵀ) of squared output error (optimal brain surgeon,
block-wise). Channels go greedily, several at a time where they do not make up for each other; H⁻¹ and W are downdated
after each step. What a transposed convolution reads is taken position by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.graph.structure import Group, Layer
from convpare.importance.registry import Context, Ranking, criterion
from convpare.redundancy.moments import Root

RIDGE = 1e-4  # relative to the mean second moment
STEPS = 64  # a group is emptied in about so many steps, if its channels allow it
JOINT = 2.0  # channels go together while that costs at most so many times what they cost one by one


@criterion("reconstruction", needs_images=True, allocation="global")
def reconstruction(context: Context) -> dict[str, Ranking]:
    """Relative squared error of the readers' outputs after least-squares compensation (second order, greedy)."""
    return _ranked(context, weighted=False)


@criterion("sensitivity", needs_images=True, allocation="global")
def sensitivity(context: Context) -> dict[str, Ranking]:
    """The same, as the relative squared error of the network's output that follows from it (Gauss-Newton)."""
    return _ranked(context, weighted=True)


def _ranked(context: Context, weighted: bool) -> dict[str, Ranking]:
    context.check_options()
    graph = context.graph
    read = {name for g in context.groups for name in g.consumers if not graph.is_depthwise(graph.layer(name))}
    layers = [layer for layer in graph.layers if layer.name in read]
    moments, outputs = context.moments.both(layers) if weighted else (context.moments.inputs(layers), {})
    rankings = {}
    for group in context.groups:
        names = [n for n in group.consumers if n in read]
        readers = [_reader(context, group, graph.layer(n), moments[n], outputs.get(n)) for n in names]
        rankings[group.name] = _eliminate(context, group, readers)
    return rankings


@dataclass
class _Reader:
    """A layer that reads a group: its weight (groups, out, unknowns), the inverse second moment, and which unknowns
    belong to each channel of the group, `blocks` (channels, unknowns per channel)."""

    weight: Tensor
    inverse: Tensor
    blocks: Tensor
    energy: float

    def errors(self) -> Tensor:
        """The relative output error of dropping each channel now, shape (channels,)."""
        inner = self.inverse[:, self.blocks[:, :, None], self.blocks[:, None, :]]  # (groups, channels, b, b)
        weights = self.weight[:, :, self.blocks].permute(0, 2, 3, 1)  # (groups, channels, b, out)
        solved: Tensor = torch.linalg.solve(inner, weights)
        return (weights * solved).sum((0, 2, 3)) / self.energy

    def joint(self, channels: Tensor) -> float:
        """The relative output error of dropping these channels together."""
        gone = self.blocks[channels].flatten()
        weights = self.weight[:, :, gone].mT
        return float((weights * torch.linalg.solve(self.inverse[:, gone[:, None], gone], weights)).sum() / self.energy)

    def drop(self, channels: Tensor) -> None:
        """Drop these channels together: downdate weight and inverse."""
        gone = self.blocks[channels].flatten()
        solved = torch.linalg.solve(self.inverse[:, gone[:, None], gone], self.inverse[:, gone])
        self.weight -= self.weight[:, :, gone] @ solved
        self.inverse -= self.inverse[:, :, gone] @ solved
        self.inverse[:, gone, gone] = 1.0  # what is gone neither couples nor makes a singular block
        self.weight[:, :, gone] = 0.0


@dataclass
class _WideReader:
    """A layer too wide for its second moment: dropping a channel costs the energy that its inputs add one by one."""

    costs: Tensor  # (channels,)

    def errors(self) -> Tensor:
        return self.costs

    def joint(self, channels: Tensor) -> float:
        return float(self.costs[channels].sum())

    def drop(self, channels: Tensor) -> None:
        self.costs[channels] = 0.0


def _reader(
    context: Context, group: Group, layer: Layer, moment: Tensor, outputs: Tensor | None
) -> "_Reader | _WideReader":
    """How a layer reads a group; with `outputs`, F of the layer, errors are of the network's output."""
    weight = context.tensor(layer.weight).double()
    slots = context.graph.units[layer.into]
    if layer.kind == "conv_transpose":  # (groups, out per group and kernel position, in per group)
        weight = weight.reshape(layer.groups, moment.shape[1], -1).mT
        slots = slots[: moment.shape[1]]  # the same in every group
    else:
        weight = weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)
    unit = None
    if outputs is not None:
        unit = context.graph.inputs[0][0] / layer.positions  # errors are of all positions of an image
        weight = (Root.of(outputs).root @ weight.reshape(layer.groups, outputs.shape[1], -1)).reshape(weight.shape)
    taps = moment.shape[1] // len(slots)
    mine = (slots >= group.start) & (slots < group.start + group.channels)
    order = np.argsort(slots[mine], kind="stable")
    index = torch.from_numpy(np.flatnonzero(mine)[order].reshape(group.channels, -1)).to(weight.device)
    blocks = (index[:, :, None] * taps + torch.arange(taps, device=weight.device)).flatten(1)
    if moment.ndim == 2:
        parts = (weight.square().sum(1) * moment).sum(0)
        return _WideReader(parts[blocks].sum(1) / (unit or float(parts.sum().clamp_min(1e-300))))
    energy = unit or float(((weight @ moment) * weight).sum().clamp_min(1e-300))
    ridge = RIDGE * moment.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
    eye = torch.eye(moment.shape[1], dtype=torch.float64, device=weight.device)
    factor, failed = torch.linalg.cholesky_ex(moment + ridge[:, None, None] * eye)
    if failed.any():
        raise ConvpareError(f"the inputs of layer {layer.name!r} span too wide a range to be fitted; take l2")
    return _Reader(weight.clone(), torch.cholesky_inverse(factor), blocks, energy)


def _eliminate(context: Context, group: Group, readers: Sequence["_Reader | _WideReader"]) -> Ranking:
    """Drop the cheapest channels step by step until none is left, those that are gone already before all."""
    if not readers:
        raise ConvpareError(f"no layer that could be fitted reads group {group.name!r}; exclude it, or take l2")
    gone = np.flatnonzero(~context.alive[group.units])
    order, costs = [torch.from_numpy(gone)], [torch.zeros(len(gone), dtype=torch.float64)]
    left = torch.from_numpy(np.flatnonzero(context.alive[group.units]))
    step = max(1, group.channels // STEPS)
    while len(left):
        errors = sum((r.errors().cpu() for r in readers), torch.zeros(group.channels, dtype=torch.float64))
        chosen = left[errors[left].argsort(stable=True)[:step]]
        while len(chosen) > 1 and _joint(readers, chosen) > JOINT * float(errors[chosen].sum()):
            chosen = chosen[: len(chosen) // 2]
        share = errors[chosen].clamp_min(1e-300)
        order.append(chosen)
        costs.append(max(_joint(readers, chosen), 0.0) * share / share.sum())
        for reader in readers:
            reader.drop(chosen)
        left = left[~torch.isin(left, chosen)]
    return Ranking(torch.cat(order).numpy(), torch.cat(costs).numpy())


def _joint(readers: Sequence["_Reader | _WideReader"], channels: Tensor) -> float:
    return sum(reader.joint(channels) for reader in readers)
