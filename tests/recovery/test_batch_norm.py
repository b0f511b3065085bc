"""Recalibrated statistics are those of the population, by hand; everything else stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.recovery.batch_norm import norms_of, recalibrate_

X = torch.randn(23, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)
    ).eval()


@pytest.mark.parametrize("size", [23, 8, 5, 1])
def test_the_first_norm_has_the_population_statistics(size: int):
    """Whatever the batches, the last one smaller: of images of 4x4 values even one is a batch."""
    model = net()
    recalibrate_(model, X.split(size))
    with torch.no_grad():
        seen = model[0](X).double()
    assert torch.allclose(model[1].running_mean.double(), seen.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(model[1].running_var.double(), seen.var((0, 2, 3), correction=0), rtol=1e-5)


@pytest.mark.parametrize("size", [23, 7])
def test_later_norms_see_what_training_shows_them(size: int):
    model = net()
    twin = copy.deepcopy(model)
    recalibrate_(model, X.split(size))
    with torch.no_grad():
        parts = [
            F.batch_norm(twin[0](x), None, None, twin[1].weight, twin[1].bias, training=True) for x in X.split(size)
        ]
        seen = torch.cat([twin[3](F.relu(p)) for p in parts]).double()
    assert torch.allclose(model[4].running_mean.double(), seen.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(model[4].running_var.double(), seen.var((0, 2, 3), correction=0), rtol=1e-5)
    if size == 23:  # one batch: the network now does in evaluation what it did in training
        with torch.no_grad():
            assert torch.allclose(model(X), copy.deepcopy(twin).train()(X), atol=1e-4)


def test_all_else_stays():
    model = net()
    model[4].momentum = None
    model[0].train()
    model[1].num_batches_tracked.fill_(7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, draws = [m.training for m in model.modules()], torch.get_rng_state()
    recalibrate_(model, X.split(10))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"1.running_mean", "1.running_var", "4.running_mean", "4.running_var"}
    assert (model[1].momentum, model[4].momentum) == (0.3, None)
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(draws, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_norms_without_statistics_and_norms_that_do_not_run():
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.free = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
            self.used, self.unused = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.free(self.conv(x)))

    model = Partial()
    assert list(norms_of(model)) == ["used", "unused"]
    recalibrate_(model, X.split(10))
    assert torch.equal(model.unused.running_mean, torch.zeros(4))
    assert torch.equal(model.unused.running_var, torch.ones(4))
    assert not torch.equal(model.used.running_mean, torch.zeros(4))
    assert list(norms_of(nn.Conv2d(3, 4, 1))) == []


def test_a_norm_that_runs_twice_sees_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x + 1)

    model = Twice()
    recalibrate_(model, X.split(10))
    both = torch.cat([X, 3 * X + 1]).double()
    assert torch.allclose(model.norm.running_mean.double(), both.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model.norm.running_var.double(), both.var((0, 2, 3), correction=0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype):
    model = net().to(dtype)
    recalibrate_(model, X.to(dtype).split(10))
    reference = net()
    recalibrate_(reference, X.split(10))
    assert model[1].running_var.dtype is dtype
    assert torch.allclose(model[1].running_var.float(), reference[1].running_var, rtol=0.02)


def test_one_value_a_channel_has_no_variance():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    with pytest.raises(ConvpareError, match="batch norm '2' sees one value a channel in a batch; give larger batches"):
        recalibrate_(model, X.split(11))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    recalibrate_(model, X.split(12))
    assert torch.allclose(model[2].running_mean, X.mean((0, 2, 3)), atol=1e-5)
