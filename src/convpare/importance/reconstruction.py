"""Second-order selection: which channels can the layers that read them do best without, after compensation?

For a layer that reads x, with weight W and second moment H = E[x xᵀ] of what its kernel sees, dropping the inputs J and
re-fitting the others by least squares costs tr(W_J [(H⁻¹)_JJ]⁻¹ W_Jᵀ) of squared output error (optimal brain surgeon,
block-wise). Channels go greedily, H⁻¹ and W are downdated after each step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph.structure import Group, Layer
from convpare.importance.registry import Context, Ranking, criterion
from convpare.modes import eval_mode
from convpare.redundancy.patches import Geometry, columns, draw_places

RIDGE = 1e-4  # relative to the mean second moment
SAMPLES = 32  # positions per unknown
LEAST_SAMPLES = 4096
WIDEST = 6144  # above, a layer's inputs are scored one by one, without compensation by the others
STEPS = 64  # a group is emptied in about so many steps at most


@criterion("reconstruction", needs_images=True, allocation="global")
def reconstruction(context: Context) -> dict[str, Ranking]:
    """Relative squared error of the readers' outputs after least-squares compensation (second order, greedy)."""
    if context.options:
        raise ConvpareError(f"criterion reconstruction has no option {sorted(context.options)[0]!r}")
    if context.images is None:
        raise ConvpareError("criterion reconstruction looks at activations and needs images: give data")
    graph = context.graph
    read = {name for g in graph.groups for name in g.consumers if not graph.is_depthwise(graph.layer(name))}
    moments = _moments(context.model, [layer for layer in graph.layers if layer.name in read], context.images)
    rankings = {}
    for group in graph.groups:
        readers = [_Reader.of(context, group, graph.layer(n), moments[n]) for n in group.consumers if n in read]
        rankings[group.name] = _eliminate(group, readers)
    return rankings


def _moments(model: nn.Module, layers: list[Layer], images: Tensor) -> dict[str, Tensor]:
    """E[x xᵀ] of what each layer's kernel sees, (groups, unknowns, unknowns) float64, from sampled positions."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys((layer.name for layer in layers), 0)
    generator = torch.Generator().manual_seed(0)
    handles = []

    def listen(layer: Layer) -> None:
        module = model.get_submodule(layer.name)
        geometry = Geometry.of_module(module)

        def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].movedim(-1, 1) if layer.kind == "linear" else inputs[0]
            taps = int(np.prod(geometry.kernel))
            unknowns = x.shape[1] // layer.groups * taps
            total = int(np.prod(geometry.outputs(tuple(x.shape[2:])) if geometry.kernel else x.shape[2:]))
            share = max(SAMPLES * unknowns, LEAST_SAMPLES) / (len(images) * total)
            seen = columns(x, geometry, draw_places(total, share, generator), layer.groups)
            moment = (seen @ seen.mT).double()
            sums[layer.name] = sums[layer.name] + moment if counts[layer.name] else moment
            counts[layer.name] += seen.shape[2]

        handles.append(module.register_forward_pre_hook(hear))

    try:
        for layer in layers:
            listen(layer)
        device = next(model.parameters()).device
        with eval_mode(model), torch.no_grad():
            for batch in images.split(64):
                model(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: moment / counts[name] for name, moment in sums.items()}


@dataclass
class _Reader:
    """A layer that reads a group: its weight (groups, out, unknowns), the inverse second moment, and which unknowns
    belong to each channel of the group, `blocks` (channels, unknowns per channel)."""

    weight: Tensor
    inverse: Tensor
    blocks: Tensor
    energy: float

    @staticmethod
    def of(context: Context, group: Group, layer: Layer, moment: Tensor) -> "_Reader":
        weight = context.tensor(layer.weight).double()
        slots = context.graph.units[layer.into]
        if layer.kind == "conv_transpose":
            weight = weight.movedim(layer.in_axis, 1).movedim(1, -1).flatten(0, -2)
            weight = weight.reshape(layer.groups, -1, moment.shape[1])
        else:
            weight = weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)
        taps = moment.shape[1] // len(slots)
        mine = (slots >= group.start) & (slots < group.start + group.channels)
        order = np.argsort(slots[mine], kind="stable")
        index = torch.from_numpy(np.flatnonzero(mine)[order].reshape(group.channels, -1)).to(weight.device)
        blocks = (index[:, :, None] * taps + torch.arange(taps, device=weight.device)).flatten(1)
        energy = float(((weight @ moment) * weight).sum().clamp_min(1e-300))
        ridge = RIDGE * moment.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
        eye = torch.eye(moment.shape[1], dtype=torch.float64, device=weight.device)
        regular = moment + ridge[:, None, None] * eye
        if moment.shape[1] > WIDEST:
            inverse = torch.diag_embed(regular.diagonal(dim1=1, dim2=2).reciprocal())
        else:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular))
        return _Reader(weight.clone(), inverse, blocks, energy)

    def errors(self) -> Tensor:
        """The relative output error of dropping each channel now, shape (channels,)."""
        rows = self.blocks[:, :, None], self.blocks[:, None, :]
        inner = self.inverse[:, rows[0], rows[1]]  # (groups, channels, b, b)
        weights = self.weight[:, :, self.blocks].permute(0, 2, 3, 1)  # (groups, channels, b, out)
        return (weights * torch.linalg.solve(inner, weights)).sum((0, 2, 3)) / self.energy

    def drop(self, channels: Tensor) -> float:
        """Drop these channels together: downdate weight and inverse; the relative error that it costs."""
        gone = self.blocks[channels].flatten()
        inner = self.inverse[:, gone[:, None], gone]
        weights = self.weight[:, :, gone]
        solved = torch.linalg.solve(inner, self.inverse[:, gone])
        cost = float((weights.mT * torch.linalg.solve(inner, weights.mT)).sum() / self.energy)
        self.weight -= weights @ solved
        self.inverse -= self.inverse[:, :, gone] @ solved
        self.inverse[:, gone, gone] = 1.0  # what is gone neither couples nor makes a singular block
        self.weight[:, :, gone] = 0.0
        return cost


def _eliminate(group: Group, readers: list[_Reader]) -> Ranking:
    """Drop the cheapest channels step by step until none is left."""
    if not readers:
        raise ConvpareError(f"no layer that could be fitted reads group {group.name!r}; use another criterion")
    left = torch.arange(group.channels)
    order, costs = [], []
    step = max(1, group.channels // STEPS)
    while len(left):
        errors = sum((r.errors().cpu() for r in readers), torch.zeros(group.channels, dtype=torch.float64))[left]
        cheapest = errors.argsort(stable=True)[:step]
        chosen = left[cheapest]
        cost = sum(r.drop(chosen.to(r.blocks.device)) for r in readers)
        share = errors[cheapest].clamp_min(1e-300)
        order.append(chosen)
        costs.append(max(cost, 0.0) * share / share.sum())
        left = left[~torch.isin(left, chosen)]
    return Ranking(torch.cat(order).numpy(), torch.cat(costs).numpy())
