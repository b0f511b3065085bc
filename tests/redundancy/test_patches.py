"""Columns are what `F.unfold` makes and what a convolution multiplies, at any positions, along one to three axes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convpare.redundancy.patches import Geometry, columns, draw_places, second_moment, split_groups


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everywhere(geometry: Geometry, x: Tensor) -> Tensor:
    return torch.arange(geometry_positions(geometry, x))


def geometry_positions(geometry: Geometry, x: Tensor) -> int:
    return int(torch.tensor(geometry.outputs(tuple(x.shape[2:]))).prod())


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
)
def test_columns_are_unfolds(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
):
    x = noise(2, 3, *size)
    geometry = Geometry.of(kernel, stride, padding, dilation)
    expected = F.unfold(x, kernel, dilation, padding, stride)  # (b, channels · taps, positions)
    got = columns(x, geometry, everywhere(geometry, x), groups=1)
    assert geometry_positions(geometry, x) == expected.shape[2]
    assert torch.equal(got[0], expected.permute(1, 0, 2).flatten(1))
    places = torch.tensor([expected.shape[2] - 1, 0, expected.shape[2] // 2])
    assert torch.equal(columns(x, geometry, places, 1)[0], expected[:, :, places].permute(1, 0, 2).flatten(1))


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    nn.Conv1d(4, 6, 4, padding="same", dilation=2),
    nn.Conv1d(4, 4, 3, padding="valid", groups=4),
    nn.Conv2d(4, 8, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    nn.Conv2d(4, 8, 4, padding="same"),
    nn.Conv2d(4, 12, 3, padding=1, groups=4),
    nn.Conv2d(4, 4, 1, groups=2),
    nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), groups=2),
    nn.Conv3d(4, 2, 2, padding="same", dilation=(1, 2, 1)),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_a_convolution_is_a_product_with_columns(conv: nn.Module):
    conv = conv.double()
    x = noise(3, 4, *(7, 6, 5)[: conv.weight.ndim - 2])
    geometry = Geometry.of_module(conv)
    with torch.no_grad():
        expected = conv(x)
    assert geometry.outputs(tuple(x.shape[2:])) == tuple(expected.shape[2:])
    weight = conv.weight.detach().reshape(conv.groups, -1, conv.weight[0].numel())
    bias = conv.bias.detach().reshape(conv.groups, -1, 1)
    got = weight @ columns(x, geometry, everywhere(geometry, x), conv.groups) + bias
    assert torch.allclose(got, split_groups(expected.flatten(2), conv.groups), rtol=0, atol=1e-12)


def test_linear_layers_have_columns_of_one_element():
    assert Geometry.of_module(nn.Linear(3, 2)) == Geometry()
    assert Geometry.of_module(nn.ConvTranspose2d(3, 2, 2)) == Geometry()
    x = noise(2, 6, 4, 5)
    places = torch.tensor([3, 19])
    got = columns(x, Geometry(), places, 2)
    assert torch.equal(got, split_groups(x.flatten(2)[:, :, places], 2))
    assert torch.equal(columns(x[:, :, 0, 0], Geometry(), torch.tensor([0]), 1)[0], x[:, :, 0, 0].T)


def test_groups_are_split_in_order():
    x = torch.arange(2 * 4 * 3).reshape(2, 4, 3)
    got = split_groups(x, 2)
    assert got.shape == (2, 2, 6)
    for group, channel, image, place in itertools.product(range(2), range(2), range(2), range(3)):
        assert got[group, channel, 3 * image + place] == x[image, 2 * group + channel, place]


def test_places():
    generator = torch.Generator().manual_seed(0)
    assert draw_places(7, 1.0, generator).tolist() == list(range(7))
    assert draw_places(7, 2.5, generator).tolist() == list(range(7))
    assert len(draw_places(1000, 1e-9, generator)) == 1
    drawn = draw_places(1000, 0.25, generator)
    assert len(drawn) == 250 == len(set(drawn.tolist()))
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    again = draw_places(1000, 0.25, torch.Generator().manual_seed(3))
    assert torch.equal(again, draw_places(1000, 0.25, torch.Generator().manual_seed(3)))


def test_second_moments_survive_a_large_mean():
    """Small directions beside a mean that carries nearly all the energy: in float32 alone they would be lost."""
    x = 30 + torch.randn(1, 600, 900, generator=torch.Generator().manual_seed(0))
    x[0, :300] = 1e-2 * x[0, :300].round()
    exact = x.double() @ x.double().mT
    got = second_moment(x)
    assert got.dtype is torch.float64
    assert torch.allclose(got, exact, rtol=1e-6, atol=0)
    lowest = torch.linalg.eigvalsh(got[0] - exact[0]).abs().max() / 900
    assert lowest < 2e-5
    assert torch.linalg.eigvalsh((x @ x.mT)[0].double() - exact[0]).abs().max() / 900 > 10 * lowest
    wide = torch.randn(3, 4, 50, dtype=torch.float64)
    assert torch.allclose(second_moment(wide), wide @ wide.mT, rtol=1e-12)
