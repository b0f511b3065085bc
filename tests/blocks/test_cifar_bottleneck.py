import pytest
import torch
from torch import nn

from convpare.blocks import resnet50_cifar
from convpare.blocks.cifar_bottleneck import Bottleneck, CifarBottleneckNet
from convpare.zoo import load_model


@pytest.fixture(scope="module")
def model() -> CifarBottleneckNet:
    return resnet50_cifar().eval()


def test_parameters(model):
    assert sum(p.numel() for p in model.parameters()) == 23_520_842


def test_depth_and_ratio(model):
    blocks = [m for m in model.modules() if isinstance(m, Bottleneck)]
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [3, 4, 6, 3]
    assert {m.conv3.out_channels / m.conv3.in_channels for m in blocks} == {4.0}  # K/R
    projections = [m for m in blocks if not isinstance(m.shortcut, nn.Identity)]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 50 + len(projections) == 54


def test_sizes_of_the_stages(model):
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sizes == [(256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4)]


def test_identity_shortcut():
    block = Bottleneck(16, 4, 1).eval()
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_it_is_in_the_zoo():
    source = load_model("convpare:resnet50_cifar", num_classes=3)
    assert source.input_shape == (1, 3, 32, 32)
    assert source.module.linear.out_features == 3
