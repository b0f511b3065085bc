from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from convpare.blocks import Design, bottleneck_width_factor, width_for_params
from convpare.blocks.designs import KINDS, Block, ChannelShuffle, ZeroPadSubsample, parameters
from convpare.errors import ConvpareError
from convpare.planning.cost import count

RATIOS = (Fraction(1, 6), Fraction(1, 2), 1, 2, 3, 4, 8)


def blocks_of(model: nn.Module) -> list[Block]:
    return [m for m in model.modules() if isinstance(m, Block)]


def block_by_hand(kind: str, c_in: int, rank: int, channels: int, taps: int, groups: int) -> int:
    """Weights and batch norms of one block."""
    reduce, spatial, expand = c_in * rank, taps * rank * rank, rank * channels
    if kind in ("separable", "inverted", "shufflenet"):
        spatial = taps * rank
    if kind == "resnext":
        spatial //= groups
    if kind == "shufflenet":
        reduce, expand = reduce // groups, expand // groups
    return reduce + spatial + expand + 2 * (2 * rank + channels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio_of_every_block(kind, ratio):
    design = Design(kind, 24, ratio, blocks=(1, 2))
    blocks = blocks_of(design.build())
    assert [b.expand[0].in_channels for b in blocks] == [24, 48, 48]
    assert {Fraction(b.expand[0].out_channels, b.expand[0].in_channels) for b in blocks} == {Fraction(ratio)}
    assert design.ranks == (24, 48)
    assert design.channels == (24 * ratio, 48 * ratio)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_parameters_by_hand(kind, dims):
    taps = 3**dims
    design = Design(kind, 8, 3, dims=dims, blocks=(2, 1), num_classes=5, in_channels=2, groups=4)
    stem, head = taps * 2 * 24 + 2 * 24, 48 * 5 + 5
    shapes = ((24, 8, 24), (24, 8, 24), (24, 16, 48))
    by_hand = stem + sum(block_by_hand(kind, *shape, taps, 4) for shape in shapes) + head
    assert parameters(design) == by_hand
    assert sum(p.numel() for p in design.build().parameters()) == by_hand


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dims", "shape"), [(2, (3, 3, 9, 8)), (3, (3, 3, 5, 9, 8))])
def test_forward(kind, dims, shape):
    model = Design(kind, 8, 2, dims=dims, num_classes=6).build().eval()
    sizes = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    assert model(torch.randn(shape)).shape == (3, 6)
    halved = {2: [(9, 8), (5, 4), (3, 2)], 3: [(5, 9, 8), (3, 5, 4), (2, 3, 2)]}[dims]
    assert sizes == [(channels, *size) for channels, size in zip((16, 32, 64), halved, strict=True)]


@pytest.mark.parametrize("kind", ["bottleneck", "inverted", "resnext", "shufflenet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_identity_shortcut(kind, dims):
    block = Block(Design(kind, 8, 2, dims=dims), 16, 8, 16, stride=1).eval()
    nn.init.zeros_(block.expand[0].weight)
    x = torch.randn(2, 16, *[4] * dims)
    assert torch.equal(block(x), x if kind == "inverted" else x.relu())


def test_separable_blocks_have_no_shortcut():
    block = Block(Design("separable", 8, 2), 16, 8, 16, stride=1).eval()
    nn.init.zeros_(block.expand[0].weight)
    assert not block(torch.randn(2, 16, 4, 4)).any()


def test_shortcut_between_stages_subsamples_and_fills_up():
    x = torch.randn(2, 3, 5, 4, 6)
    out = ZeroPadSubsample(2, 4)(x)
    assert out.shape == (2, 7, 3, 2, 3)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2, ::2])
    assert not out[:, 3:].any()
    assert ZeroPadSubsample(1, 0)(x) is x


def test_channel_shuffle_is_torchs():
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(ChannelShuffle(3)(x), nn.ChannelShuffle(3)(x))
    assert ChannelShuffle(2)(torch.arange(6.0).reshape(1, 6, 1, 1, 1)).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_groups_of_the_convolutions():
    def groups(kind: str) -> tuple[int, ...]:
        block = Block(Design(kind, 8, 2, groups=4), 16, 8, 16, stride=1)
        return block.reduce[0].groups, block.spatial[0].groups, block.expand[0].groups

    expected = {"bottleneck": (1, 1, 1), "separable": (1, 8, 1), "inverted": (1, 8, 1), "resnext": (1, 4, 1),
                "shufflenet": (4, 8, 4)}  # fmt: skip
    assert {kind: groups(kind) for kind in KINDS} == expected


def test_macs_of_an_identity_bottleneck_follow_its_parameters():
    small, large = (Design("bottleneck", 8, 4, blocks=(n,)) for n in (1, 2))
    x = torch.zeros(1, 3, 6, 6)
    more = count(large.build(), x).total.macs - count(small.build(), x).total.macs
    assert more == 36 * (2 * 4 + 9) * 8**2


def test_widths_of_equal_bottlenecks():
    factors = [bottleneck_width_factor(ratio) for ratio in (1, 2, 3, 4, 6, 8)]
    assert factors == pytest.approx([1.243, 1.144, 1.065, 1.0, 0.900, 0.825], abs=6e-4)
    for ratio, factor in zip((1, 2, 3, 4, 6, 8), factors, strict=True):
        assert (2 * ratio + 9) * factor**2 == pytest.approx(17)
    assert bottleneck_width_factor(1, 4, taps=27) == pytest.approx((35 / 29) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [Fraction(1, 2), 1, 3, 8])
def test_width_for_params_is_the_nearest(kind, ratio):
    anchor = Design(kind, 24, 4, groups=2)
    target = parameters(anchor)
    design = replace(anchor, ratio=ratio)
    rank = width_for_params(design, target)
    unit = design.step / 4
    best, *others = (abs(parameters(replace(design, rank=rank + k * unit)) - target) for k in (0, -2, -1, 1, 2))
    assert best <= min(others)
    assert best < 0.04 * target


def test_width_for_params_finds_the_design_again_and_its_ends():
    for rank in (1, 2, 5, 12):
        design = Design("bottleneck", rank, 4)
        assert width_for_params(design, parameters(design)) == rank
    assert width_for_params(Design("bottleneck", 8, 4, blocks=(1,)), 1) == 1
    with pytest.raises(ConvpareError, match="params is 0"):
        width_for_params(design, 0)


def test_a_deep_bottleneck_approaches_the_closed_form():
    anchor = Design("bottleneck", 64, 4, blocks=(16,))
    rank = width_for_params(replace(anchor, ratio=1), parameters(anchor))
    assert rank / 64 == pytest.approx(bottleneck_width_factor(1), abs=0.03)


def test_ranks_between_whole_numbers():
    assert Design("bottleneck", 7.75, 4).ranks == (8, 16, 31)
    assert Design("bottleneck", 10, Fraction(1, 6)).ranks == (12, 18, 42)
    assert Design("inverted", 30, 1 / 6).channels == (5, 10, 20)
    assert Design("shufflenet", 1, 2, groups=4).ranks == (4, 4, 4)


def test_counting_takes_no_random_numbers():
    before = torch.get_rng_state()
    parameters(Design("bottleneck", 8, 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dense"}, "choose one of bottleneck, separable"),
        ({"dims": 1}, "2 for images or 3"),
        ({"rank": 0}, "above 0"),
        ({"ratio": -1}, "above 0"),
        ({"blocks": ()}, "above 0"),
        ({"blocks": (1, 0)}, "above 0"),
        ({"groups": 0}, "above 0"),
    ],
)
def test_what_is_no_design(change, message):
    with pytest.raises(ConvpareError, match=message):
        replace(Design("bottleneck", 8, 4), **change)


def test_widths_of_nothing():
    with pytest.raises(ConvpareError, match="above 0"):
        bottleneck_width_factor(0)
