"""Costs by hand, by PyTorch's own counter, and after surgery."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convpare.blocks.cifar import resnet20, resnet56
from convpare.errors import ConvpareError
from convpare.graph import removed, trace
from convpare.planning.cost import Cost, count, count_graph, layer_cost, total_cost


def cost_of(layer: nn.Module, *shape: int) -> Cost:
    counted = count(layer, torch.zeros(shape))
    assert len(counted.layers) == 1
    assert counted.not_counted == {}
    assert next(iter(counted.layers.values())) == counted.total
    return counted.total


def test_convolution():
    # 8 x 6 x 6 outputs of 3 * 9 products each; 216 weights and 8 biases
    assert cost_of(nn.Conv2d(3, 8, 3), 1, 3, 8, 8) == Cost(8 * 36 * 27, 8 * 27 + 8, 8 * 36)
    assert cost_of(nn.Conv2d(3, 8, 3, bias=False), 1, 3, 8, 8) == Cost(7776, 216, 288)
    assert cost_of(nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2), 1, 3, 8, 8) == Cost(8 * 9 * 27, 224, 8 * 9)


def test_batch_is_included():
    assert cost_of(nn.Conv2d(3, 8, 3), 2, 3, 8, 8) == Cost(2 * 7776, 224, 2 * 288)


def test_grouped_convolution():
    assert cost_of(nn.Conv2d(4, 8, 3, groups=2), 1, 4, 5, 5) == Cost(9 * 8 * 2 * 9, 8 * 2 * 9 + 8, 8 * 9)


def test_depthwise_convolution():
    assert cost_of(nn.Conv2d(4, 8, 3, groups=4), 1, 4, 5, 5) == Cost(9 * 8 * 9, 8 * 9 + 8, 8 * 9)


def test_transposed_convolution():
    # every one of the 25 inputs is spread over 2 x 2 outputs by a kernel of 6 x 4 x 2 x 2
    assert cost_of(nn.ConvTranspose2d(6, 4, 2, stride=2), 1, 6, 5, 5) == Cost(25 * 96, 96 + 4, 4 * 100)
    assert cost_of(nn.ConvTranspose2d(6, 4, 3, groups=2), 1, 6, 5, 5) == Cost(25 * 6 * 2 * 9, 108 + 4, 4 * 49)
    assert cost_of(nn.ConvTranspose2d(6, 6, 3, groups=6), 1, 6, 5, 5) == Cost(25 * 6 * 9, 54 + 6, 6 * 49)
    assert cost_of(nn.ConvTranspose2d(6, 3, 3, groups=3), 1, 6, 5, 5) == Cost(25 * 6 * 9, 54 + 3, 3 * 49)


def test_one_and_three_dimensions():
    assert cost_of(nn.Conv1d(2, 5, 4), 1, 2, 10) == Cost(7 * 40, 45, 5 * 7)
    assert cost_of(nn.Conv3d(1, 2, 2), 1, 1, 3, 3, 3) == Cost(8 * 16, 18, 2 * 8)


def test_linear():
    assert cost_of(nn.Linear(7, 5), 3, 7) == Cost(3 * 35, 40, 15)
    assert cost_of(nn.Linear(7, 5, bias=False), 2, 4, 7) == Cost(8 * 35, 35, 40)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.max_pool2d(self.conv(x), 2))


def test_a_layer_that_runs_twice():
    """Its work counts twice, its parameters once."""
    assert cost_of(Reused(), 1, 3, 8, 8) == Cost((64 + 16) * 81, 84, 3 * (64 + 16))


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    counted = count(model, torch.zeros(1, 4, 2, 2))
    assert counted.total == Cost(2 * 4 * 16, 16 + 4 + 4 + 8, 2 * 16)


def test_parameters_of_other_layers_stand_in_the_total():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4))
    counted = count(model, torch.zeros(1, 3, 2, 2))
    assert counted.layers == {"0": Cost(48, 12, 16)}
    assert counted.total.params == 12 + 8 + 4  # the running statistics are none


def test_what_is_not_counted_is_named():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.zeros(1, 3, 4)
    counted = count(model, (x, x, x))
    assert sum(counted.not_counted.values()) >= 1
    assert "not counted: " in str(counted)


def test_table():
    assert str(count(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 8, 8))).splitlines() == [
        "layer            MACs   parameters  activations",
        "0               7,776          224          288",
        "total           7,776          224          288",
    ]


def test_json():
    assert count(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 8, 8)).to_json() == {
        "macs": 7776, "params": 224, "activations": 288, "not_counted": {},
        "layers": {"0": {"macs": 7776, "params": 224, "activations": 288}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("build", "macs", "params"),
    [(resnet20, 40_551_040, 269_722), (resnet56, 125_485_696, 853_018)],
)
def test_cifar_resnets(build, macs: int, params: int):
    """125.49 M multiply-accumulates and 0.85 M parameters are the literature's figures for ResNet-56."""
    model = build()
    counted = count(model, torch.zeros(1, 3, 32, 32))
    assert (counted.total.macs, counted.total.params) == (macs, params)
    assert sum(c.macs for c in counted.layers.values()) == macs
    assert params == sum(p.numel() for p in model.parameters())
    assert counted.not_counted == {}


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2, padding=1))
        self.up = nn.Sequential(nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1), nn.ReLU())
        self.out = nn.Conv2d(6, 2, 1)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.up(self.down(x))).mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "upsampling"])
def test_as_pytorch_counts(name: str):
    if name == "upsampling":
        model: nn.Module = Upsampling()
    else:
        torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
        model = getattr(torchvision.models, name)(weights=None)
    x = torch.zeros(2, 3, 64, 64)
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    counted = count(model, x)
    assert counted.total.macs == counter.get_total_flops() / 2
    assert counted.total.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_predicted_after_surgery_is_what_pytorch_counts(seed: int):
    """Grouped, depthwise and transposed layers, down to a single slot a group."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, groups=4),
        nn.ConvTranspose2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 32, 3, groups=16), nn.Flatten(),
        nn.Linear(32 * 25, 6), nn.Linear(6, 2),
    ).eval()  # fmt: skip
    x = torch.zeros(2, 3, 8, 8)
    graph = trace(model, x)
    rng = np.random.default_rng(seed)
    keep = graph.keep_all()
    for group in graph.groups:
        gone = group.channels - 1 if seed == 0 else rng.integers(0, group.channels)
        keep[group.start + rng.choice(group.channels, gone, replace=False)] = False
    small = removed(model, graph, keep)
    shapes: dict[str, int] = {}
    for name, module in small.named_children():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            module.register_forward_hook(lambda m, i, out, name=name: shapes.__setitem__(name, out.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x)
    predicted = total_cost(graph, keep)
    assert predicted.macs == counter.get_total_flops() / 2
    assert predicted.params == sum(p.numel() for p in small.parameters())
    assert {layer.name: layer_cost(graph, layer, keep).activations for layer in graph.layers} == shapes
    assert predicted.activations == sum(shapes.values())
    assert count_graph(graph).total.macs > predicted.macs


def test_a_model_that_does_not_run_is_refused():
    with pytest.raises(ConvpareError, match="does not run on inputs of shape"):
        count(nn.Conv2d(3, 4, 1), torch.zeros(1, 2, 4, 4))
