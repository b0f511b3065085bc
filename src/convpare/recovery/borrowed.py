"""What training takes of a model and of torch for its time, and gives back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def running_statistics(model: nn.Module, frozen: bool) -> list[Tensor]:
    """What norms learn of the batches that they see; nothing of frozen ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if frozen:
        norms = [m for m in norms if not isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [x for m in norms for x in (m.running_mean, m.running_var) if x is not None]


@contextmanager
def training_mode(model: nn.Module, frozen: bool) -> Iterator[None]:
    """Put `model` in training mode, and give back modes and gradients, however the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.train()
    for module in model.modules():
        if frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, gradient in gradients:
            p.grad = gradient


@contextmanager
def channels_last(model: nn.Module, images: Tensor) -> Iterator[None]:
    """The memory format in which convolutions of pictures are fastest; given back as the usual one."""
    if images.ndim != 4:
        yield
        return
    formats = {p: p.stride() for p in model.parameters() if p.ndim == 4}
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, stride in formats.items():
                p.data = torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(p)


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
