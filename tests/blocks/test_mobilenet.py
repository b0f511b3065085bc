from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from convpare.blocks import mobilenet_v1, mobilenet_v1_025


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_are_the_papers():
    assert parameters(mobilenet_v1(1.0)) == 4_231_976  # table 6 of the paper: 4.2 million
    assert parameters(mobilenet_v1_025()) == 470_072  # 0.5 million


def test_every_stage_has_its_size():
    model = mobilenet_v1_025(num_classes=7).eval()
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert (
        sizes
        == [(16, 32, 32), (32, 16, 16), (32, 16, 16), (64, 8, 8), (64, 8, 8)] + [(128, 4, 4)] * 6 + [(256, 2, 2)] * 2
    )


def test_stride_two_pads_right_and_bottom_only():
    stem = mobilenet_v1_025().stem
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(stem.conv(stem.pad(x)), F.conv2d(F.pad(x, (0, 1, 0, 1)), stem.conv.weight, stride=2))
    assert {m.eps for m in stem.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


@pytest.mark.real
def test_real_weights_fit(shared: Path):
    state = load_file(shared / "weights/mobilenet_v1_025-imagenet.safetensors")
    assert mobilenet_v1_025().load_state_dict(state, strict=True) == ([], [])
