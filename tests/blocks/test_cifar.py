from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convpare.blocks import ZeroPadShortcut, resnet20, resnet32, resnet44, resnet56, resnet110


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("factory", "convolutions", "count"),
    [  # the paper's table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M
        (resnet20, 19, 269_722),
        (resnet32, 31, 464_154),
        (resnet44, 43, 658_586),
        (resnet56, 55, 853_018),
        (resnet110, 109, 1_727_962),
    ],
)
def test_depth_and_parameters(factory, convolutions, count):
    model = factory()
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == convolutions
    assert parameters(model) == count


def test_num_classes_changes_the_last_layer_only():
    model = resnet20(num_classes=100)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    assert parameters(model) == 269_722 + 90 * 65


def test_shortcut_subsamples_and_pads_by_its_attributes():
    shortcut = ZeroPadShortcut(2, 1, 3)
    x = torch.arange(2 * 2 * 5 * 4, dtype=torch.float32).reshape(2, 2, 5, 4) + 1
    out = shortcut(x)
    assert out.shape == (2, 6, 3, 2)
    assert torch.equal(out[:, 1:3], x[:, :, [0, 2, 4]][:, :, :, [0, 2]])
    assert not out[:, 0].any()
    assert not out[:, 3:].any()
    shortcut.pad_before, shortcut.pad_after = 0, 0
    assert shortcut(x).shape == (2, 2, 3, 2)
    assert "pad_before=0" in repr(shortcut)


def test_shortcuts_are_identities_or_pads_and_hold_no_parameters():
    model = resnet20()
    shapes = {name: module for name, module in model.named_modules() if name.endswith("shortcut")}
    pads = {name: m for name, m in shapes.items() if isinstance(m, ZeroPadShortcut)}
    assert set(pads) == {"layer2.0.shortcut", "layer3.0.shortcut"}
    assert [(m.stride, m.pad_before, m.pad_after) for m in pads.values()] == [(2, 8, 8), (2, 16, 16)]
    assert all(type(m) is torch.nn.Identity for name, m in shapes.items() if name not in pads)


@pytest.mark.real
@pytest.mark.parametrize(("factory", "depth"), [(resnet20, 20), (resnet56, 56)])
def test_real_weights_fit(shared: Path, factory, depth):
    state = load_file(shared / f"weights/resnet{depth}-cifar10.safetensors")
    assert factory().load_state_dict(state, strict=True) == ([], [])
