"""Torch-Pruning removes the same channels and comes to the same network, where it can."""

import copy
import warnings

import pytest
import torch
from checks import calibrate, outputs, randomise
from torch import nn

from convpare.graph import removed, trace

torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
tp = pytest.importorskip("torch_pruning")

SIDE = 64
# network → (convolution, output channels to remove): inner ones, residual streams, the channels before a flatten
ROOTS = {
    "resnet18": [
        ("layer1.0.conv1", [0, 7, 63]),
        ("conv1", [2, 6, 9, 40]),
        ("layer3.0.downsample.0", [1, 2, 3, 255]),
        ("layer4.1.conv2", [0, 100, 511]),
    ],
    "mobilenet_v2": [
        ("features.0.0", [0, 5, 31]),
        ("features.2.conv.0.0", [3, 4, 90]),
        ("features.4.conv.2", [1, 31]),
        ("features.18.0", [0, 1, 2, 1279]),
    ],
    "vgg11_bn": [("features.0", [1, 2, 60]), ("features.8", [7, 250]), ("features.25", [0, 10, 20, 511])],
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    if name == "vgg11_bn":
        model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 16), nn.ReLU(), nn.Linear(16, 10))
    return calibrate(randomise(model), [(1, 3, SIDE, SIDE)]).double().eval()


def by_torch_pruning(model: nn.Module, roots: list[tuple[str, list[int]]]) -> nn.Module:
    small = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.float64)
        graph = tp.DependencyGraph().build_dependency(small, example_inputs=x)
        for root, indices in roots:
            layer = small.get_submodule(root)
            group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=indices)
            assert graph.check_pruning_group(group)
            group.prune()
    return small


def by_convpare(model: nn.Module, roots: list[tuple[str, list[int]]]) -> nn.Module:
    graph = trace(model, torch.zeros(1, 3, SIDE, SIDE, dtype=torch.float64))
    keep = graph.keep_all()
    for root, indices in roots:
        units = graph.units[f"{root}.weight", 0][indices]
        assert (units >= 0).all()
        keep[units] = False
    return removed(model, graph, keep)


def assert_same(model: nn.Module, roots: list[tuple[str, list[int]]]) -> None:
    theirs, ours = by_torch_pruning(model, roots), by_convpare(model, roots)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    for name, p in theirs.state_dict().items():
        assert torch.equal(p, ours.state_dict()[name]), name
    attributes = ("in_channels", "out_channels", "groups", "num_features", "in_features", "out_features")
    for (name, a), (_, b) in zip(theirs.named_modules(), ours.named_modules(), strict=True):
        assert [getattr(a, k, None) for k in attributes] == [getattr(b, k, None) for k in attributes], name
    x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected,), (got,), (dense,) = outputs(theirs, [x]), outputs(ours, [x]), outputs(model, [x])
    assert float((expected - got).abs().max() / expected.abs().max()) < 1e-6
    assert float((dense - got).abs().max() / dense.abs().max()) > 1e-4


@pytest.mark.parametrize("name", ROOTS)
def test_same_network_as_torch_pruning(name: str):
    model = build(name)
    assert_same(model, ROOTS[name][:1])
    assert_same(model, ROOTS[name])
