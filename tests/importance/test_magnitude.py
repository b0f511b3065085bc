"""The baselines by hand, and as Torch-Pruning ranks."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.blocks import resnet20
from convpare.errors import ConvpareError
from convpare.graph import trace
from convpare.importance import Context, Ranking, criteria, get_criterion

X = torch.zeros(1, 3, 6, 6)


def rank(name: str, model: nn.Module, group: str, x: Tensor = X, gone: tuple[int, ...] = ()) -> Ranking:
    graph = trace(model, x)
    alive = graph.keep_all()
    alive[graph.group(group).start + np.array(gone, int)] = False
    return get_criterion(name).rank(Context(model, graph, alive))[group]


def filled(shape: tuple[int, ...], values: list[float]) -> nn.Parameter:
    """A kernel whose filters are constant, one value each."""
    weight = torch.zeros(shape)
    weight += torch.tensor(values).reshape(-1, *[1] * (len(shape) - 1))
    return nn.Parameter(weight)


def test_norms_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0, 0], [1, 1, 1], [2, -2, 0], [0, 0, 0.5]]).reshape(4, 3, 1, 1))
    one, two = rank("l1", model, "0"), rank("l2", model, "0")
    assert one.order.tolist() == [3, 0, 1, 2]  # 0.5, 3, 3, 4; of equals the first
    assert np.allclose(one.errors, np.array([0.5, 3, 3, 4]) / (10.5 / 4))
    assert two.order.tolist() == [3, 1, 2, 0]  # 0.25, 3, 8, 9
    assert np.allclose(two.errors, np.array([0.25, 3, 8, 9]) / (20.25 / 4))


class Residual(nn.Module):
    """One stream that two layers write, one of them depthwise; transposed and grouped ones after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up, self.c = nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 8, 1, groups=2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.last(F.relu(self.c(F.relu(self.up(y + self.b(y))))))


def test_all_filters_of_a_channel_count():
    model = Residual()
    a, b, c, up = model.a.weight.detach(), model.b.weight.detach(), model.c.weight.detach(), model.up.weight.detach()
    expected = {
        "a": a.square().sum((1, 2, 3)).reshape(2, 2).sum(0) + b.square().sum((1, 2, 3)).reshape(2, 2).sum(0),
        "up": up.square().sum((0, 2, 3)),  # a channel stands in both groups
        "c": c.square().sum((1, 2, 3)).reshape(2, 4).sum(0),
    }
    graph = trace(model, X)
    assert {g.name: g.channels for g in graph.groups} == {"a": 2, "up": 3, "c": 4}
    for group, norms in expected.items():
        got = rank("l2", model, group)
        assert got.order.tolist() == norms.argsort().tolist(), group
        assert np.allclose(got.errors, (norms / norms.mean()).sort().values.numpy(), rtol=1e-6), group


def test_batch_norm_scales_alone():
    """Also where other modules have a weight for each channel."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 3, 1), nn.PReLU(3), nn.Conv2d(3, 2, 1)
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -2.0, 0.1, 1.0]))
        model[2].weight.copy_(torch.tensor([0.0, 0.0, 100.0, 0.0]))
    graph = trace(model, X)
    context = Context(model, graph, graph.keep_all(), only=(graph.group("0"),))
    ranking = get_criterion("bn-scale").rank(context)
    assert set(ranking) == {"0"}
    assert ranking["0"].order.tolist() == [2, 0, 3, 1]
    assert np.allclose(ranking["0"].errors, np.array([0.1, 0.5, 1.0, 2.0]) / 0.9)
    with pytest.raises(ConvpareError, match="'3' has nothing that this criterion could score"):
        rank("bn-scale", model, "0")


@pytest.mark.parametrize("name", ["l1", "l2", "bn-scale", "random"])
def test_what_is_gone_goes_first(name: str):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(filled((6, 3, 1, 1), [6, 5, 4, 3, 2, 1]))
        model[1].weight.copy_(torch.tensor([6.0, 5, 4, 3, 2, 1]))
    got = rank(name, model, "0", gone=(1, 3))
    assert got.order[:2].tolist() == [1, 3]
    assert got.errors[:2].tolist() == [0, 0]
    assert (got.errors[2:] > 0).all()
    if name != "random":
        assert got.order.tolist() == [1, 3, 5, 4, 2, 0]


def test_random_is_a_permutation_that_the_seed_decides():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 2, 1))
    graph = trace(model, X)

    def order(**options: int) -> list[int]:
        return (
            get_criterion("random").rank(Context(model, graph, graph.keep_all(), options=options))["0"].order.tolist()
        )

    assert sorted(order()) == list(range(32))
    assert order() == order(seed=0) != order(seed=1)


@pytest.mark.parametrize("p", [1, 2])
def test_torch_pruning_ranks_alike(p: int):
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model, x = resnet20(), torch.zeros(1, 3, 32, 32)
    graph = trace(model, x)
    ranked = get_criterion(f"l{p}").rank(Context(model, graph, graph.keep_all()))
    plain = _without_option_a(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dependencies = tp.DependencyGraph().build_dependency(plain, example_inputs=x)
        importance = tp.importance.MagnitudeImportance(p=p, group_reduction="first", normalizer=None)
        for name in ("layer1.0.conv1", "layer2.1.conv1", "layer3.2.conv1"):
            conv = plain.get_submodule(name)
            every = list(range(conv.out_channels))
            scores = importance(dependencies.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=every))
            assert ranked[name].order.tolist() == scores.argsort(stable=True).tolist(), name
            assert np.allclose(ranked[name].errors, (scores / scores.mean()).sort().values.numpy(), rtol=1e-5)


def _without_option_a(model: nn.Module) -> nn.Module:
    """Torch-Pruning fails on the padded shortcuts; the inner convolutions do not depend on them."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("conv1", "bn1", "layer1", "layer2", "layer3"):
                self.add_module(name, getattr(model, name))

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn1(self.conv1(x))
            for stage in (self.layer1, self.layer2, self.layer3):
                for block in stage:
                    y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(y)))))
            return y

    return Inner()


def test_the_registry():
    assert set(criteria()) == {
        "qsfm-ssim",
        "qsfm-psnr",
        "reconstruction",
        "sensitivity",
        "l1",
        "l2",
        "bn-scale",
        "random",
    }
    for name, known in criteria().items():
        assert known.name == name
        assert known.summary
        assert known.allocation in ("uniform", "global")
    criteria().clear()
    assert criteria()  # it was a copy
