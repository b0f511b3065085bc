"""The K/R ratio of known designs, read off their graphs."""

import json
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.blocks.mobilenet import mobilenet_v1
from convpare.errors import ConvpareError
from convpare.redundancy.kr import Block, kr_blocks

Ratios = dict[str, tuple[int, int]]


def ratios(blocks: Sequence[Block]) -> Ratios:
    return {block.name: (block.k, block.r) for block in blocks}


def of_torchvision(name: str) -> list[Block]:
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    with torch.device("meta"):
        return kr_blocks(getattr(torchvision.models, name)(weights=None), torch.zeros(1, 3, 64, 64))


def around(block: Block) -> tuple[str, str]:
    return block.before, block.after


def residual(*widths: int) -> list[str]:
    return [f"layer{stage}.{block}" for stage, blocks in enumerate(widths, 1) for block in range(blocks)]


# ------------------------------------------------------------------------------------------------------- known designs


@pytest.mark.parametrize(("name", "expansion", "width"), [
    ("resnet50", 4, 64), ("resnext50_32x4d", 2, 128), ("wide_resnet50_2", 2, 128),
])  # fmt: skip
def test_bottlenecks(name: str, expansion: int, width: int):
    """w → w → 4w, 2w; the projections on shortcuts map stream to stream and are none."""
    stem, *blocks = of_torchvision(name)
    assert (stem.name, stem.layers, stem.k, stem.r) == ("conv1", ("conv1",), 64, 64)
    assert [block.name for block in blocks] == residual(3, 4, 6, 3)
    for block in blocks:
        w = width * 2 ** (int(block.name[5]) - 1)
        assert block.layers == tuple(f"{block.name}.conv{n}" for n in (1, 2, 3))
        assert (block.k, block.r, block.k_over_r) == (expansion * w, w, expansion)
        assert around(block) == ("relu", "add, relu")
        assert [(m.layer, m.k, m.before, m.after) for m in block.inner] == [(block.layers[0], w, "stream", "relu")]
        assert not block.removable


def test_plain_convolutions_are_of_full_rank():
    blocks = of_torchvision("resnet18")
    names = [f"{block}.conv{n}" for block in residual(2, 2, 2, 2) for n in (1, 2)]
    assert [block.name for block in blocks] == ["conv1", *names]
    assert {block.k_over_r for block in blocks} == {1.0}
    assert [around(block) for block in blocks[1:3]] == [("stream", "relu"), ("relu", "add, relu")]


# torchvision's MobileNetV2: channels that leave each inverted residual, and those that enter its last convolution
INVERTED = [(16, 32), (24, 96), (24, 144), (32, 144), *[(32, 192)] * 2, (64, 192), *[(64, 384)] * 3, (96, 384),
            *[(96, 576)] * 2, (160, 576), *[(160, 960)] * 2, (320, 960)]  # fmt: skip


def test_mobilenet_v2():
    stem, *blocks, head = of_torchvision("mobilenet_v2")
    assert (stem.k, stem.r) == (32, 27)  # more kernels of 3×3×3 than can be independent
    assert [block.name for block in blocks] == [f"features.{n}.conv" for n in range(1, 18)]
    assert [(block.k, block.r) for block in blocks] == INVERTED
    assert {round(block.k_over_r, 2) for block in blocks} == {0.5, 0.25, 0.17, 0.22, 0.33, 0.28}
    assert blocks[0].layers == ("features.1.conv.0.0", "features.1.conv.1")
    assert blocks[1].layers == ("features.2.conv.0.0", "features.2.conv.1.0", "features.2.conv.2")
    assert (head.layers, head.k, head.r) == (("features.18.0",), 1280, 320)
    assert around(head) == ("affine", "hardtanh")
    assert around(blocks[0]) == ("hardtanh", "affine")


def test_mobilenet_v1():
    with torch.device("meta"):
        stem, *blocks = kr_blocks(mobilenet_v1(), torch.zeros(1, 3, 64, 64))
    assert stem.name == "stem.conv"
    assert [block.layers for block in blocks] == [(f"blocks.{n}.dw", f"blocks.{n}.pw") for n in range(13)]
    assert [block.k_over_r for block in blocks] == [2, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    assert {around(block) for block in blocks} == {("relu6", "relu6")}


def test_shufflenet_v2():
    """c → c → c in each branch but the first, whose other branch widens 24 channels to 58."""
    stem, *blocks = of_torchvision("shufflenet_v2_x1_0")
    assert stem.name == "conv1.0"
    first = {f"stage{s}.0.branch1": 2 for s in (2, 3, 4)}
    others = {f"stage{s}.{n}.branch2": 3 for s, count in ((2, 4), (3, 8), (4, 4)) for n in range(count)}
    assert {block.name: len(block.layers) for block in blocks} == first | others
    assert ratios(blocks).pop("stage2.0.branch1") == (58, 24)
    assert {block.k_over_r for block in blocks if block.name != "stage2.0.branch1"} == {1.0}
    assert {around(block) for block in blocks} == {("affine", "relu, cat")}


def test_squeezenet_fire():
    """Both expansions read the squeeze and are put side by side: 1×1 from s to 4s, 3×3 from 9s."""
    stem, *blocks = of_torchvision("squeezenet1_0")
    squeezed = {3: 16, 4: 16, 5: 32, 7: 32, 8: 48, 9: 48, 10: 64, 12: 64}
    narrow = {f"features.{n}.expand1x1": (4 * s, s) for n, s in squeezed.items()}
    wide = {f"features.{n}.expand3x3": (4 * s, 4 * s) for n, s in squeezed.items()}
    assert stem.name == "features.0"
    assert ratios(blocks) == narrow | wide
    assert blocks[0].layers == ("features.3.squeeze", "features.3.expand1x1")
    assert around(blocks[0]) == ("relu", "relu, cat")


def test_convnext():
    stem, *blocks = of_torchvision("convnext_tiny")
    assert (stem.k, stem.r) == (96, 48)
    down = [block for block in blocks if len(block.layers) == 1]
    assert ratios(down) == {f"features.{2 * n}.1": (96 * 2**n, 96 * 2**n) for n in (1, 2, 3)}
    mixers = [block for block in blocks if len(block.layers) == 3]
    assert len(mixers) == 3 + 3 + 9 + 3
    for block in mixers:
        assert block.layers == tuple(f"{block.name}.{n}" for n in (0, 3, 5))
        assert (block.k_over_r, block.before) == (0.25, "gelu")
        (expansion,) = block.inner
        assert (expansion.k_over_r, expansion.before, expansion.after) == (4, "layer_norm", "gelu")
    assert len(blocks) == len(down) + len(mixers)


def test_gates_are_no_blocks():
    """MobileNetV3 squeezes and excites between the depthwise convolution and the last one."""
    blocks = of_torchvision("mobilenet_v3_small")
    assert [block.name for block in blocks] == ["features.0.0", *(f"features.{n}.block" for n in range(1, 12))]
    assert around(blocks[1]) == ("relu, gate", "affine")
    assert around(blocks[5]) == ("hardswish, gate", "add")
    assert blocks[5].layers == tuple(f"features.5.block.{n}.0" for n in (0, 1, 3))
    assert (blocks[5].k, blocks[5].r) == (40, 240)


class ShuffleUnit(nn.Module):
    """The ShuffleNetV1 unit: grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; stride 2 puts a pooled input beside."""

    def __init__(self, c_in: int, c_out: int, groups: int, stride: int) -> None:
        super().__init__()
        made, inner = c_out - c_in * (stride == 2), c_out // 4
        self.groups, self.stride = groups, stride
        self.reduce, self.bn1 = nn.Conv2d(c_in, inner, 1, groups=groups, bias=False), nn.BatchNorm2d(inner)
        self.dw = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.expand, self.bn3 = nn.Conv2d(inner, made, 1, groups=groups, bias=False), nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.reduce(x)))
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        y = self.bn3(self.expand(self.bn2(self.dw(y))))
        if self.stride == 2:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))
        return F.relu(x + y)


def test_shufflenet_v1():
    net = nn.Sequential(nn.Conv2d(3, 24, 3), ShuffleUnit(24, 240, 3, 2), *[ShuffleUnit(240, 240, 3, 1)] * 2)
    net[3] = ShuffleUnit(240, 240, 3, 1)
    blocks = kr_blocks(net, torch.zeros(1, 3, 16, 16))
    assert ratios(blocks) == {"0": (24, 24), "1": (216, 60), "2": (240, 60), "3": (240, 60)}
    assert [block.k_over_r for block in blocks[2:]] == [4, 4]
    assert blocks[2].layers == ("2.reduce", "2.dw", "2.expand")
    assert [around(block) for block in blocks[1:]] == [("affine", "cat, relu"), *[("affine", "add, relu")] * 2]
    assert [(m.layer, m.k, m.r) for m in blocks[2].inner] == [("2.reduce", 60, 240)]


# --------------------------------------------------------------------------------------------------------------- rules


class Wrap(nn.Module):
    def __init__(self, forward: Callable[..., object], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def conv(c_in: int, c_out: int, kernel: int = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


def chain(*layers: nn.Module) -> list[tuple[str, ...]]:
    """The layers of each block, by their numbers in a sequence."""
    return [block.layers for block in kr_blocks(nn.Sequential(*layers), torch.zeros(1, 3, 16, 16))]


def depthwise(channels: int, kernel: int = 3) -> nn.Conv2d:
    return conv(channels, channels, kernel, groups=channels)


def test_where_chains_are_cut():
    relu = nn.ReLU()
    # spatial ~ spatial: two kernels; spatial – spatial: one in factors
    assert chain(conv(3, 8, 3), relu, conv(8, 8, 3)) == [("0",), ("2",)]
    assert chain(nn.Conv2d(3, 4, (3, 1)), nn.Conv2d(4, 8, (1, 3))) == [("0", "1")]
    # between two spatial ones: ends a depthwise block, leads to the next otherwise
    assert chain(conv(3, 8, 3), relu, depthwise(8), relu, conv(8, 16), relu, depthwise(16), relu, conv(16, 16)) == [
        ("0",), ("2", "4"), ("6", "8"),
    ]  # fmt: skip
    assert chain(conv(3, 8, 3), relu, conv(8, 4), relu, conv(4, 8, 3)) == [("0",), ("2", "4")]
    # Tucker form, then CP form, with nothing between their factors
    assert chain(conv(3, 2), conv(2, 4, 3), conv(4, 8), relu, conv(8, 5), depthwise(5), conv(5, 8)) == [
        ("0", "1", "2"), ("4", "5", "6"),
    ]  # fmt: skip
    # pointwise – pointwise after a kernel: the first is the narrow end; ~: they go on
    assert chain(conv(3, 4, 3), relu, conv(4, 8), nn.BatchNorm2d(8), conv(8, 32), relu) == [("0", "2"), ("4",)]
    assert chain(conv(3, 4, 3), relu, conv(4, 8), relu, conv(8, 32), relu) == [("0", "2", "4")]
    # pooling and flattening end a chain; a lone pointwise map is no block
    assert chain(conv(3, 4, 3), nn.MaxPool2d(2), conv(4, 8), nn.Flatten(), nn.Linear(512, 10)) == [("0",)]
    assert chain(conv(3, 4, 3), nn.MaxPool2d(3, 1, 1), conv(4, 8), relu) == [("0",)]


def test_a_low_rank_pointwise_layer_is_a_block():
    """Its two factors with nothing between are a map of the inner rank."""
    (block,) = kr_blocks(nn.Sequential(conv(3, 2), conv(2, 12), nn.ReLU()), torch.zeros(1, 3, 8, 8))
    assert (block.layers, block.k, block.r, block.before, block.after) == (("0", "1"), 12, 2, "nothing", "relu")


def test_a_projection_on_a_shortcut_is_no_block():
    """Neither where the stream comes right from a convolution."""
    net = Wrap(
        lambda n, x: n.c(F.relu(n.b(F.relu(n.a(y := F.relu(n.stem(x))))))) + n.project(y),
        stem=conv(3, 8, 3), a=conv(8, 4), b=conv(4, 4, 3), c=conv(4, 16), project=conv(8, 16),
    )  # fmt: skip
    assert [block.layers for block in kr_blocks(net, torch.zeros(1, 3, 8, 8))] == [("stem",), ("a", "b", "c")]


def test_gates_of_all_kinds():
    def forward(net: Wrap, x: Tensor) -> Tensor:
        y = net.dw(net.a(x))
        y = y * torch.sigmoid(y)  # an activation, spelled out
        y = y * torch.sigmoid(net.up(F.relu(net.down(y.mean((2, 3), keepdim=True)))))
        return net.last(y * x.amax((1, 2, 3), keepdim=True)) * net.scale

    parts = {"a": conv(3, 8), "dw": depthwise(8), "down": conv(8, 2), "up": conv(2, 8), "last": conv(8, 4)}
    (block,) = kr_blocks(Wrap(forward, scale=torch.ones(4, 1, 1), **parts), torch.zeros(1, 3, 8, 8))
    assert block.layers == ("a", "dw", "last")
    assert around(block) == ("gate", "affine")


def test_a_product_of_two_branches_is_no_gate():
    net = Wrap(lambda n, x: n.z(n.a(x) * n.b(x)), a=conv(3, 8, 3), b=conv(3, 8, 3), z=conv(8, 4))
    blocks = kr_blocks(net, torch.zeros(1, 3, 8, 8))
    assert [(block.layers, block.after) for block in blocks] == [(("a",), "mul"), (("b",), "mul")]


def test_a_value_that_is_read_elsewhere_is_the_stream():
    net = Wrap(lambda n, x: (n.z(y := n.a(x)), y), a=conv(3, 8, 3), z=conv(8, 4))
    assert [(block.layers, block.before) for block in kr_blocks(net, torch.zeros(1, 3, 8, 8))] == [(("a",), "stream")]


def test_an_operator_in_place_stands_between_whatever_it_is_called():
    net = Wrap(lambda n, x: (F.relu_(y := n.a(x)), n.z(y))[1], a=conv(3, 8, 3), z=conv(8, 4))
    (block,) = kr_blocks(net, torch.zeros(1, 3, 8, 8))
    assert (block.layers, block.before) == (("a", "z"), "relu")


def test_what_follows_is_told_up_to_the_next_layer():
    """Not along the stream, which goes on through every sum; nor into a gate."""

    def forward(net: Wrap, x: Tensor) -> Tensor:
        x = net.stem(x)
        for block in (net.a, net.b, net.c):
            x = x + block(F.relu(x))
        return x

    parts = {name: nn.Sequential(conv(8, 2, 3), nn.Sigmoid(), conv(2, 8)) for name in "abc"}
    blocks = kr_blocks(Wrap(forward, stem=conv(3, 8, 3), **parts), torch.zeros(1, 3, 8, 8))
    assert {b.name: b.after for b in blocks} == {"stem": "relu", "a": "add, relu", "b": "add, relu", "c": "add"}

    def gated(net: Wrap, x: Tensor) -> Tensor:
        y = net.block(x)
        return net.z(F.gelu(y * net.gate(y.mean((2, 3), keepdim=True)) + x.mean()))

    parts = {"block": nn.Sequential(conv(3, 4, 3), nn.Tanh(), conv(4, 8)), "gate": conv(8, 8), "z": conv(8, 2, 3)}
    assert around(kr_blocks(Wrap(gated, **parts), torch.zeros(1, 3, 8, 8))[0]) == ("tanh", "gate, add, gelu")


def test_a_shape_that_is_read_is_no_branch():
    net = Wrap(
        lambda n, x: n.z(F.relu(n.bn((y := n.a(x)).flatten(0, 1)).reshape_as(y))).sum(1), a=nn.Linear(4, 6),
        bn=nn.BatchNorm1d(6), z=nn.Linear(6, 12),
    )  # fmt: skip
    last = conv(1, 2, 3)
    whole = Wrap(lambda n, x: last(net(x)[:, None, :, None]), net=net, last=last)
    (block, _) = kr_blocks(whole, torch.zeros(2, 5, 4))
    assert (block.name, block.k, block.r, around(block)) == ("net", 12, 6, ("relu", "affine"))


def test_names_without_modules_and_in_functional_nets():
    net = Wrap(
        lambda n, x: F.conv2d(F.relu(F.conv2d(x, n.w1, padding=1)), n.w2) * 1, w1=torch.ones(4, 3, 3, 3),
        w2=torch.ones(8, 4, 1, 1),
    )  # fmt: skip
    (block,) = kr_blocks(net, torch.zeros(1, 3, 8, 8))
    assert (block.name, block.layers, block.k, block.r) == ("w2", ("w1", "w2"), 8, 4)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(conv(3, 4, 3)), nn.ReLU(), conv(4, 8))
    (block,) = kr_blocks(nn.Sequential(normed), torch.zeros(1, 3, 8, 8))
    assert (block.name, block.layers) == ("0", ("0.0", "0.2"))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions(dims: int):
    convolution, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv3d, nn.BatchNorm3d)
    bottleneck = nn.Sequential(
        convolution(3, 2, 1), norm(2), nn.ReLU(), convolution(2, 2, 3, padding=1), norm(2), nn.ReLU(),
        convolution(2, 8, 1), norm(8),
    )  # fmt: skip
    net = Wrap(lambda n, x: F.relu(n.block(x) + x.mean(1, keepdim=True)), block=bottleneck)
    (block,) = kr_blocks(net, torch.zeros(1, 3, *[5] * dims))
    assert (block.name, block.k, block.r, around(block)) == ("block", 8, 2, ("relu", "add, relu"))


def test_transposed_and_grouped_kernels():
    net = nn.Sequential(nn.ConvTranspose2d(3, 40, 2, 2, groups=1), nn.ReLU(), nn.Conv2d(40, 80, 3, groups=40))
    assert [(block.k, block.r) for block in kr_blocks(net, torch.zeros(1, 3, 8, 8))] == [(40, 12), (80, 80)]


def test_linear_layers():
    """A multilayer perceptron within a net is a block; one that makes the output is a head, which is none."""
    mlp = {"up": nn.Linear(8, 32), "down": nn.Linear(32, 8), "fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 10)}
    net = Wrap(lambda n, x: n.fc2(F.relu(n.fc1((x + n.down(F.gelu(n.up(x)))).mean(1)))), **mlp)
    (block,) = kr_blocks(net, torch.zeros(2, 5, 8))
    assert (block.layers, block.k, block.r, around(block)) == (("up", "down"), 8, 32, ("gelu", "add"))
    assert [(m.k, m.r, m.after) for m in block.inner] == [(32, 8, "gelu")]


def test_what_is_removable():
    """An expansion with nothing nonlinear after it, as `mergeable` finds it; narrower maps never."""
    linear = nn.Sequential(conv(3, 2), conv(2, 2, 3), conv(2, 8), nn.BatchNorm2d(8), conv(8, 4), conv(4, 4, 3))
    first, second = kr_blocks(linear, torch.zeros(1, 3, 8, 8))
    assert (first.layers, first.k_over_r, first.after, first.removable) == (("0", "1", "2"), 4, "affine", True)
    assert (second.layers, second.removable) == (("4", "5"), False)
    rectified = nn.Sequential(*linear[:3], nn.ReLU(), *linear[4:])
    assert [block.removable for block in kr_blocks(rectified, torch.zeros(1, 3, 8, 8))] == [False, False]


def test_statistics_of_the_batch_are_not_affine():
    net = nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), conv(4, 8), nn.ReLU())
    (block,) = kr_blocks(net, torch.zeros(2, 3, 8, 8))
    assert block.before == "batch_norm"


def test_blocks_are_plain_data_and_the_model_is_as_it_was():
    net = nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 8), nn.Dropout(), nn.ReLU())
    net[1].eval()
    state, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    rng = torch.get_rng_state()
    (block,) = kr_blocks(net, torch.zeros(1, 3, 8, 8))
    assert json.loads(json.dumps(block.to_json())) == {
        "name": "3", "layers": ["0", "3"], "k": 8, "r": 4, "k_over_r": 2.0, "before": "relu", "after": "relu",
        "removable": False, "inner": [], "trained_rank": None,
    }  # fmt: skip
    assert modes == [m.training for m in net.modules()]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def test_a_model_that_does_not_run_is_an_error():
    with pytest.raises(ConvpareError, match="does not run on inputs of shape"):
        kr_blocks(conv(3, 4), torch.zeros(1, 5, 8, 8))
