"""Batch-norm recalibration: running statistics that belong to the compressed network, without labels or gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph.sync import BATCH_NORMS
from convpare.modes import eval_mode


def recalibrate_(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running mean and variance of every batch norm to those of its inputs over all batches, in place.

    Means and second moments are averaged over batches with their sizes as weights, which gives the population variance;
    the average of the batches' own variances, as an exponential average keeps it, is too small for small batches. In
    one pass a layer sees inputs normalised by the batch, as in training. Modules without running statistics stay.

    Raises:
        ConvpareError: a batch has one value a channel for some batch norm, which has no variance.
    """
    norms = norms_of(model)
    moments = {norm: _Moments(name, norm) for name, norm in norms.items()}
    hooks = [norm.register_forward_pre_hook(lambda m, inputs: moments[m].update(inputs[0])) for norm in moments]
    try:
        with eval_mode(model), torch.no_grad():
            for norm in moments:
                norm.training = True
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for moment in moments.values():
        moment.write()


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms that keep running statistics, by name."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, BATCH_NORMS) and m.running_mean is not None}


class _Moments:
    """Mean and second moment of a batch norm's input, per channel, in float64. Its own statistics are kept aside."""

    def __init__(self, name: str, norm: nn.Module) -> None:
        self.name, self.norm = name, norm
        self.count = 0
        self.sum = self.square = torch.zeros(0)
        self.tracked = norm.num_batches_tracked.clone() if norm.num_batches_tracked is not None else None  # type: ignore[operator]

    def update(self, x: Tensor) -> None:
        if x.numel() == x.shape[1]:
            raise ConvpareError(f"batch norm {self.name!r} sees one value a channel in a batch; give larger batches")
        axes = [a for a in range(x.ndim) if a != 1]
        wide = x.detach().double()
        total, square = wide.sum(axes), wide.square().sum(axes)
        self.sum, self.square = (total, square) if not self.count else (self.sum + total, self.square + square)
        self.count += x.numel() // x.shape[1]

    def write(self) -> None:
        if self.count:
            mean = self.sum / self.count
            self.norm.running_mean.copy_(mean)  # type: ignore[operator]
            self.norm.running_var.copy_((self.square / self.count - mean.square()).clamp_min(0))  # type: ignore[operator]
        if self.tracked is not None:
            self.norm.num_batches_tracked.copy_(self.tracked)  # type: ignore[operator]
