import torch
from torch import nn

from convpare.blocks import vanilla4
from convpare.zoo import load_model


def test_four_convolutions_and_their_parameters():
    model = vanilla4()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [(3, 32), (32, 64), (64, 128), (128, 256)]
    by_hand = sum(9 * a * b + b for a, b in ((3, 32), (32, 64), (64, 128), (128, 256))) + 256 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == by_hand == 390_986


def test_widths_channels_classes_and_sizes_of_images():
    model = vanilla4(num_classes=7, widths=(4, 6), in_channels=1)
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [4, 6]
    assert model(torch.zeros(2, 1, 9, 4)).shape == (2, 7)
    assert vanilla4()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_it_is_the_composition_it_says():
    model, x = vanilla4(widths=(4, 6)).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    first, second = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    h = nn.functional.max_pool2d(first(x).relu(), 2)
    h = nn.functional.max_pool2d(second(h).relu(), 2)
    torch.testing.assert_close(model(x), model.linear(h.mean((2, 3))))


def test_it_is_in_the_zoo():
    source = load_model("convpare:vanilla4", num_classes=5)
    assert source.input_shape == (1, 3, 32, 32)
    assert source.module(torch.zeros(source.input_shape)).shape == (1, 5)
