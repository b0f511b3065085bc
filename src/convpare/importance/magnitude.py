"""Baselines that look at the weights alone: L1 and L2 norm of filters, batch-norm scale, chance."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.graph.structure import Axis, Group
from convpare.graph.sync import BATCH_NORMS
from convpare.importance.registry import Context, Ranking, criterion


@criterion("l1")
def l1(context: Context) -> dict[str, Ranking]:
    """L1 norm of the filters that produce a channel, as a share of the group's mean."""
    return _by_filters(context, lambda rows: rows.abs().sum(1))


@criterion("l2")
def l2(context: Context) -> dict[str, Ranking]:
    """L2 norm (squared) of the filters that produce a channel, as a share of the group's mean."""
    return _by_filters(context, lambda rows: rows.square().sum(1))


@criterion("bn-scale")
def bn_scale(context: Context) -> dict[str, Ranking]:
    """Magnitude of the batch-norm scale of a channel (Network Slimming), as a share of the group's mean."""
    context.check_options()
    modules = context.model.named_modules()
    scales = [(f"{name}.weight", 0) for name, m in modules if isinstance(m, BATCH_NORMS)]
    return {g.name: _rank(_summed(context, g, scales, lambda rows: rows.abs().sum(1)), context, g)
            for g in context.groups}  # fmt: skip


@criterion("random", allocation="uniform")
def random(context: Context) -> dict[str, Ranking]:
    """Channels in random order (option seed, 0): the baseline that every criterion must beat."""
    context.check_options("seed")
    generator = np.random.default_rng(int(context.options.get("seed", 0)))
    return {
        g.name: _rank(torch.from_numpy(generator.permutation(g.channels) + 1.0), context, g)
        for g in context.graph.groups
    }


def _by_filters(context: Context, norm: Callable[[Tensor], Tensor]) -> dict[str, Ranking]:
    context.check_options()
    layers = {layer.name: layer for layer in context.graph.layers}
    return {
        g.name: _rank(_summed(context, g, [layers[p].out for p in g.producers], norm), context, g)
        for g in context.groups
    }


def _summed(context: Context, group: Group, axes: list[Axis], norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The norm of every slot of `axes`, summed over the slots of each channel, float64, shape (channels,)."""
    total = torch.zeros(group.channels, dtype=torch.float64)
    borne = False
    for name, axis in axes:
        units = context.graph.units.get((name, axis))
        if units is None:
            continue
        mine = np.flatnonzero((units >= group.start) & (units < group.start + group.channels))
        if len(mine):
            borne = True
            rows = context.tensor(name).cpu().double().movedim(axis, 0)[mine].reshape(len(mine), -1)
            total.index_add_(0, torch.from_numpy(units[mine] - group.start), norm(rows))
    if not borne:
        raise ConvpareError(
            f"group {group.name!r} has nothing that this criterion could score (no batch norm?); use l2, or exclude it"
        )
    return total


def _rank(scores: Tensor, context: Context, group: Group) -> Ranking:
    """Channels with small scores first, those that are gone already before all; scores as a share of their mean."""
    alive = torch.from_numpy(context.alive[group.units])
    scores = torch.where(alive, scores / scores.mean().clamp_min(1e-300), torch.zeros_like(scores))
    order = torch.argsort(torch.where(alive, scores, torch.full_like(scores, -1.0)), stable=True)
    return Ranking(order.numpy(), scores[order].numpy())
