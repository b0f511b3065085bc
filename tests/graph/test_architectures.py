"""Zeroed == removed, predicted cost, true attributes and an untouched original, from torchvision to odd forwards."""

from collections.abc import Callable

import nets
import pytest
import torch
import torch.nn.functional as F
from checks import FOLLOWS_NOT, OUTPUT, WHOLE, assert_exact, random_keep
from torch import nn

from convpare.blocks.cifar import resnet20
from convpare.blocks.mobilenet import mobilenet_v1_025
from convpare.graph import Graph, removed, trace
from convpare.graph.structure import Form

torchvision = pytest.importorskip("torchvision", exc_type=ImportError)

Build = Callable[[], nn.Module]


def prunable_share(graph: Graph) -> float:
    """Removable output channels over all those that the model's output does not need as they are."""
    outputs = sum(graph.shapes[layer.weight][layer.out_axis] for layer in graph.layers)
    needed = sum(f.channels for f in graph.frozen if f.reason == OUTPUT)
    removable = sum(int((graph.units[layer.out] >= 0).sum()) for layer in graph.layers if layer.out in graph.units)
    return removable / (outputs - needed)


def reasons(graph: Graph) -> set[str]:
    return {f.reason for f in graph.frozen} - {OUTPUT}


# name → side of the input, layers, groups, removable channels
TORCHVISION = {
    "resnet18": (64, 21, 12, 2880),  # 4 residual streams and 8 inner convolutions: 2 * 960 + 960 channels
    "vgg11_bn": (32, 11, 10, 2880),  # 2752 channels of 8 convolutions, 64 + 64 of the linear layers
    "densenet121": (32, 121, 120, 10240),
    "squeezenet1_0": (64, 26, 25, 2976),
    "mobilenet_v2": (32, 53, 25, 9128),
    "mobilenet_v3_small": (32, 54, 27, 4872),
    "efficientnet_b0": (32, 82, 40, 11404),
    "shufflenet_v2_x1_0": (32, 57, 21, 3167),
    "resnext50_32x4d": (32, 54, 37, 4376),
    "googlenet": (64, 58, 57, 7280),
    "inception_v3": (75, 95, 94, 17216),
}


def build_torchvision(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)
    if name == "vgg11_bn":  # as it is, but for the width of its linear layers: 130 million parameters would be slow
        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
        vgg = torchvision.models.VGG(features, num_classes=10)
        vgg.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(),
            nn.Linear(64, 10),
        )  # fmt: skip
        return vgg
    return model(weights=None, num_classes=10, **options)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str):
    side, layers, groups, channels = TORCHVISION[name]
    graph = assert_exact(lambda: build_torchvision(name), [(1, 3, side, side)], (0,))
    assert (len(graph.layers), len(graph.groups), graph.channels) == (layers, groups, channels)
    assert reasons(graph) == set()
    assert prunable_share(graph) == 1.0
    auxiliary = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}.get(name, ())
    assert {unreached.split(".")[0] for unreached in graph.unreached} == set(auxiliary)


def shallow(name: str) -> nn.Module:
    """The same architectures with fewer layers where there are many alike."""
    if name == "vgg11_bn":
        features = torchvision.models.vgg.make_layers([16, "M", 24, "M", 32, 32, "M"], batch_norm=True)
        vgg = torchvision.models.VGG(features, num_classes=10)
        vgg.classifier = nn.Sequential(nn.Linear(32 * 7 * 7, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
        return vgg
    models, block = torchvision.models, torchvision.models.efficientnet.MBConvConfig
    builds: dict[str, Build] = {
        "densenet121": lambda: models.DenseNet(8, (2, 3, 2), 16, num_classes=10),
        "resnext50_32x4d": lambda: models.ResNet(
            models.resnet.Bottleneck, [1, 2, 1, 1], 10, groups=32, width_per_group=4
        ),
        "mobilenet_v2": lambda: models.MobileNetV2(
            10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
        ),
        "efficientnet_b0": lambda: models.EfficientNet(
            [block(1, 3, 1, 32, 16, 1, 1, 1), block(6, 3, 2, 16, 24, 2, 1, 1), block(6, 5, 2, 24, 40, 1, 1, 1)], 0.2,
            num_classes=10,
        ),
        "shufflenet_v2_x1_0": lambda: models.ShuffleNetV2([2, 3, 2], [24, 48, 96, 192, 256], 10),
    }  # fmt: skip
    return builds[name]() if name in builds else build_torchvision(name)


# name → layers, groups, removable channels of the graph form
SHALLOW = {
    **{name: numbers[1:] for name, numbers in TORCHVISION.items()},
    "densenet121": (18, 17, 16 + 7 * (32 + 8) + 16 + 20),
    "resnext50_32x4d": (21, 15, 64 + 256 + 512 + 1024 + 2048 + 2 * (4 + 2 * 8 + 16 + 32)),
    "mobilenet_v2": (14, 8, 32 + 16 + 96 + 24 + 144 + 144 + 32 + 1280),
    "efficientnet_b0": (22, 12, 32 + 8 + 16 + 96 + 4 + 24 + 144 + 6 + 144 + 6 + 40 + 160),
    # each shuffle is a choice of positions: 3 convolutions in the first block of a stage make channels, then 2 in each
    "shufflenet_v2_x1_0": (30, 28, 24 + 24 * (3 + 2) + 48 * (3 + 2 * 2) + 96 * (3 + 2) + 256),
    "vgg11_bn": (6, 5, 16 + 24 + 32 + 32 + 16),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_torchvision_in_the_graph_form(name: str):
    side = TORCHVISION[name][0]
    graph = assert_exact(lambda: shallow(name), [(1, 3, side, side)], (0,), "graph")
    assert (len(graph.layers), len(graph.groups), graph.channels) == SHALLOW[name]
    assert reasons(graph) == set()
    assert prunable_share(graph) == 1.0
    assert graph.unreached == ()  # it holds what it needs, and no more
    assert not any("aux" in parameter.lower() for parameter in graph.parameters)


def awake(model: nn.Module) -> nn.Module:
    """With parameters large enough that every layer is felt: those of transformers start at zero, or nearly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    return model


def vit() -> nn.Module:
    return awake(
        torchvision.models.VisionTransformer(
            image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=40, num_classes=5
        )
    )


def swin() -> nn.Module:
    return awake(torchvision.models.SwinTransformer([2, 2], 24, [2, 1], [3, 6], [2, 2], num_classes=5))


def convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return awake(torchvision.models.ConvNeXt([block(12, 20, 1), block(20, None, 1)], num_classes=5))


# name → how to build it, side of the input, and for each form the groups as (name, channels): those that are exact, and
# those of the residual stream, which layer norms average over
NORMED: dict[str, tuple[Build, int, dict[str, tuple[list[tuple[str, int]], list[tuple[str, int]]]]]] = {
    "vision transformer": (
        vit,
        16,
        {
            "module": (  # `embed_dim` counts the stream and the heads' channels alike
                [(f"encoder.layers.encoder_layer_{n}.mlp.0", 40) for n in range(2)],
                [("conv_proj", 4)],
            ),
            "graph": (
                [
                    (f"encoder.layers.encoder_layer_{n}.{layer}", size)
                    for n in range(2)
                    for layer, size in [("self_attention.in_proj_weight", 4), ("mlp.0", 40)]
                ],
                [("conv_proj", 24)],
            ),
        },
    ),
    "swin transformer": (
        swin,
        16,
        {
            "module": (  # the heads' channels are `C // num_heads`
                [("features.1.0.mlp.0", 96), ("features.1.1.mlp.0", 96), ("features.3.0.mlp.0", 192)],
                [],
            ),
            "graph": (
                [
                    (f"features.{stage}.{n}.{layer}", size)
                    for stage, n, heads, wide in [(1, 0, 3, 96), (1, 1, 3, 96), (3, 0, 6, 192)]
                    for layer, size in [("attn.qkv", heads), ("mlp.0", wide)]
                ],
                [("features.0.0", 24), ("features.2.reduction", 48)],
            ),
        },
    ),
    "convnext": (
        convnext,
        32,
        dict.fromkeys(
            WHOLE,
            (
                [("features.1.0.block.3", 48), ("features.3.0.block.3", 80)],
                [("features.0.0", 12), ("features.2.1", 20)],
            ),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("name", NORMED)
def test_torchvision_with_layer_norms(name: str, form: Form):
    build, side, expected = NORMED[name]
    graph = assert_exact(build, [(2, 3, side, side)], (0,), form)
    found = [[(g.name, g.channels) for g in graph.groups if bool(g.inexact) == inexact] for inexact in (False, True)]
    assert tuple(found) == expected[form]
    assert all(g.inexact.startswith("layer_norm in ") for g in graph.groups if g.inexact)
    if form == "graph":
        assert reasons(graph) == set()


IMAGE = [(2, 3, 8, 8)]

# name → how to build it, shapes of its inputs, groups as (name, channels) or (name, channels, why the others change
# when these go), what the reasons of frozen channels say; for the module form, and for both if not `IN_GRAPH`
CASES: dict[str, tuple[Build, list[tuple[int, ...]], list[tuple], list[str]]] = {
    "u-net": (
        nets.UNet,
        [(2, 3, 16, 16)],
        [("down1", 8), ("down2", 12), ("mid", 16), ("up2", 12), ("merge2", 4), ("up1", 4), ("merge1", 8)],
        [],
    ),
    "1-d": (nets.OneD, [(2, 2, 16)], [("features.0", 4), ("features.3", 6), ("head.0", 10)], []),
    "3-d": (nets.ThreeD, [(1, 1, 4, 4, 4)], [("first", 8), ("inner.0", 6), ("up", 6)], []),
    "grouped 1": (lambda: nets.grouped(1), IMAGE, [("before", 16), ("inner.0", 32)], []),
    "grouped 2": (lambda: nets.grouped(2), IMAGE, [("before", 8), ("inner.0", 16)], []),
    "grouped 4": (lambda: nets.grouped(4), IMAGE, [("before", 4), ("inner.0", 8)], []),
    "grouped, down to one slot a group": (lambda: nets.grouped(4, 8, 16), IMAGE, [("before", 2), ("inner.0", 4)], []),
    "depthwise": (lambda: nets.grouped(16, 16, 16), IMAGE, [("before", 16)], []),
    "depthwise, multiplier 2": (lambda: nets.grouped(16), IMAGE, [("before", 16)], []),
    "grouped, one output a group": (lambda: nets.grouped(8, 16, 8), IMAGE, [("before", 2), ("inner.0", 1)], []),
    "transposed": (lambda: nets.grouped(1, transposed=True), IMAGE, [("before", 16), ("inner.0", 32)], []),
    "transposed, grouped 2": (lambda: nets.grouped(2, transposed=True), IMAGE, [("before", 8), ("inner.0", 16)], []),
    "transposed, down to one slot a group": (
        lambda: nets.grouped(4, 8, 8, transposed=True),
        IMAGE,
        [("before", 2), ("inner.0", 2)],
        [],
    ),
    "transposed, depthwise": (lambda: nets.grouped(16, 16, 16, transposed=True), IMAGE, [("before", 16)], []),
    "transposed, two inputs a group": (lambda: nets.grouped(8, 16, 8, transposed=True), IMAGE, [("before", 8)], []),
    "transposed, two outputs a group": (
        lambda: nets.grouped(16, transposed=True),
        IMAGE,
        [("before", 1), ("inner.0", 2)],
        [],
    ),
    "flatten, linear": (
        lambda: nn.Sequential(
            nets.conv(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 12),
            nn.Tanh(),
            nn.Linear(12, 4),
        ),
        IMAGE,
        [("0", 8), ("4", 12)],
        [],
    ),
    "one output channel": (nets.one_output_channel, IMAGE, [("first", 16)], []),
    "one input channel": (nets.one_input_channel, [(2, 1, 8, 8)], [("first", 8)], []),
    "tied module": (nets.tied_module, IMAGE, [("first", 8)], []),
    "tied parameter": (nets.tied_parameter, IMAGE, [("first", 8), ("one", 12)], []),
    "two inputs": (nets.two_inputs, [(2, 3, 8, 8), (2, 2, 8, 8)], [("left", 8), ("right", 6)], []),
    "nested outputs": (nets.nested_outputs, IMAGE, [("first", 8), ("second", 12)], []),
    "naked parameters": (nets.naked_parameters, IMAGE, [("kernel", 12)], []),
    "depthwise by function": (nets.functional_depthwise, IMAGE, [("first", 12)], []),
    "depthwise by function, groups written": (
        nets.functional_depthwise_literal,
        IMAGE,
        [],
        ["conv2d in Net takes a number"],
    ),
    "dilated": (
        lambda: nets.Residual(nets.conv(8, 12, 3, dilation=2, padding=2), 8, 12),
        IMAGE,
        [("before", 8), ("inner", 12)],
        [],
    ),
    "padding same": (
        lambda: nets.Residual(nets.conv(8, 12, 3, padding="same", groups=2), 8, 12),
        IMAGE,
        [("before", 4), ("inner", 6)],
        [],
    ),
    "padding reflect": (
        lambda: nets.Residual(nets.conv(8, 12, 3, padding=1, padding_mode="reflect"), 8, 12),
        IMAGE,
        [("before", 8), ("inner", 12)],
        [],
    ),
    "padding circular": (
        lambda: nets.Residual(nets.conv(8, 8, 3, padding=1, padding_mode="circular", groups=8), 8, 8),
        IMAGE,
        [("before", 8)],
        [],
    ),
    "pads of every mode": (lambda: nets.sandwich(nets.pads), IMAGE, [("first", 16)], []),
    "squeeze and excitation, convolutions": (
        lambda: nets.squeeze_excitation("conv"),
        IMAGE,
        [("first", 16), ("down", 6)],
        [],
    ),
    "squeeze and excitation, view": (lambda: nets.squeeze_excitation("view"), IMAGE, [("first", 16), ("down", 6)], []),
    "squeeze and excitation, expand_as": (
        lambda: nets.squeeze_excitation("expand_as"),
        IMAGE,
        [("first", 16), ("down", 6)],
        [],
    ),
    "pixel shuffle and back": (nets.pixel_shuffle, IMAGE, [("first", 6), ("second", 8)], []),
    "channel shuffle, module": (lambda: nets.Residual(nn.ChannelShuffle(4), 16, 16), IMAGE, [("before", 4)], []),
    "shuffle, sizes computed": (lambda: nets.sandwich(nets.shuffle), IMAGE, [("first", 4)], []),
    "shuffle, size left open": (lambda: nets.sandwich(nets.shuffle_open), IMAGE, [("first", 4)], []),
    "shuffle, slots written": (
        lambda: nets.sandwich(nets.shuffle_slots_written),
        IMAGE,
        [],
        ["view in Net takes a number"],
    ),
    "shuffle, slots written, groups computed": (
        lambda: nets.sandwich(nets.shuffle_slots_computed),
        IMAGE,
        [],
        ["view in Net takes a number"],
    ),
    "shuffle, sizes written": (
        lambda: nets.sandwich(nets.shuffle_all_written),
        IMAGE,
        [],
        ["in Net takes a number"],
    ),
    "chunk": (lambda: nets.sandwich(nets.halves_chunked, c_after=24), IMAGE, [("first", 8)], []),
    "split, size computed": (lambda: nets.sandwich(nets.halves_computed), IMAGE, [("first", 8)], []),
    "split, size written": (
        lambda: nets.sandwich(nets.halves_written),
        IMAGE,
        [],
        ["split in Net takes a number"],
    ),
    "split, uneven": (lambda: nets.sandwich(nets.uneven_parts), IMAGE, [], ["split_with_sizes in Net takes a number"]),
    "slice written": (lambda: nets.sandwich(nets.slice_written), IMAGE, [], ["slice in Net takes a number"]),
    "channels padded, then added": (
        lambda: nets.sandwich(
            lambda net, y: net.inner(y) + F.pad(y, (0, 0, 0, 0, 1, 3)), 16, 20, inner=nets.conv(16, 20)
        ),
        IMAGE,
        [("first", 16)],
        ["pad in Net takes a number"],
    ),
    "channels padded up to a number": (
        lambda: nets.sandwich(
            lambda net, y: net.inner(y) + F.pad(y, (0, 0, 0, 0, 0, 20 - y.shape[1])), 16, 20, inner=nets.conv(16, 20)
        ),
        IMAGE,
        [],
        ["pad in Net takes a number"],
    ),
    "channels padded by copies": (
        lambda: nets.sandwich(nets.copies_of_channels, c_after=18),
        IMAGE,
        [],
        ["with copies of them"],
    ),
    "channels cropped": (
        lambda: nets.sandwich(lambda net, y: F.pad(y, (0, 0, 0, 0, -2, -3)), c_after=11),
        IMAGE,
        [("first", 11)],
        ["pad in Net takes a number"],
    ),
    "one padding module, run twice": (nets.TwiceAround, IMAGE, [("first", 8), ("second", 4)], []),
    "batch norm without affine": (
        lambda: nets.Residual(nn.BatchNorm2d(8, affine=False), 8, 8),
        IMAGE,
        [("before", 8)],
        [],
    ),
    "batch norm without statistics": (
        lambda: nets.Residual(nn.BatchNorm2d(8, track_running_stats=False), 8, 8),
        IMAGE,
        [("before", 8)],
        [],
    ),
    "instance norm, affine": (
        lambda: nets.Residual(nn.InstanceNorm2d(8, affine=True), 8, 8),
        IMAGE,
        [("before", 8)],
        [],
    ),
    "instance norm, tracked": (
        lambda: nets.Residual(nn.InstanceNorm2d(8, affine=True, track_running_stats=True), 8, 8),
        IMAGE,
        [("before", 8)],
        [],
    ),
    "instance norm over groups": (
        lambda: nets.sandwich(nets.instance_statistics_over_groups),
        IMAGE,
        [],
        ["view in Net takes a number"],
    ),
    "group norm": (lambda: nets.Residual(nn.GroupNorm(4, 8), 8, 8), IMAGE, [("before", 4)], []),
    "group norm of one group": (
        lambda: nets.Residual(nn.GroupNorm(1, 8), 8, 8),
        IMAGE,
        [("before", 8, "group_norm in inner normalises over them")],
        [],
    ),
    "layer norm": (
        lambda: nets.sandwich(
            lambda net, y: net.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(16)
        ),
        IMAGE,
        [("first", 16, "layer_norm in norm normalises over them")],
        [],
    ),
    "local response norm": (lambda: nets.Residual(nn.LocalResponseNorm(3), 8, 8), IMAGE, [], ["pool"]),
    "channels last": (
        lambda: nets.sandwich(nets.channels_last, down=nn.Linear(16, 6), up=nn.Linear(6, 16)),
        IMAGE,
        [("first", 16), ("down", 6)],
        [],
    ),
    "adaptive max pool": (lambda: nets.Residual(nn.AdaptiveMaxPool2d(2), 8, 8), IMAGE, [("before", 8)], []),
    "clamped by a parameter": (
        lambda: nets.sandwich(lambda net, y: torch.clamp(y, max=net.ceiling), ceiling=torch.full((16, 1, 1), 0.2)),
        IMAGE,
        [("first", 16)],
        [],
    ),
    "other type and back": (
        lambda: nets.sandwich(lambda net, y: y.double().to(net.last.weight.dtype)),
        IMAGE,
        [("first", 16)],
        [],
    ),
    "written into zeros": (lambda: nets.sandwich(nets.write_into_zeros), IMAGE, [("first", 16)], []),
    "written into a part": (
        lambda: nets.sandwich(nets.write_into_part, inner=nets.conv(16, 8)),
        IMAGE,
        [("first", 8)],
        [],
    ),
    "outer product": (
        lambda: nets.sandwich(nets.outer_product, c_after=96, second=nn.Linear(16, 6)),
        IMAGE,
        [("first", 1)],
        [],
    ),
    "variance of everything": (
        lambda: nets.sandwich(lambda net, y: y * y.var(unbiased=False)),
        IMAGE,
        [("first", 16, "var in Net averages over them")],
        [],
    ),
    "parametrized, depthwise": (nets.parametrized_depthwise, IMAGE, [("before", 12)], []),
    "a tensor that is no parameter": (nets.PlainTensor, IMAGE, [("first", 4)], []),
    "attention of PyTorch": (nets.torch_attention, IMAGE, [("first", 2)], []),
    "weight norm": (
        nets.weight_norm,
        IMAGE,
        [
            ("first", 8, "_weight_norm in inner.parametrizations.weight.0 normalises the weight over them"),
            ("inner.parametrizations.weight.original1", 12),
        ],
        [],
    ),
}

# the same for the graph form, where it is another: all numbers are followed there
IN_GRAPH: dict[str, tuple[list[tuple], list[str]]] = {
    "depthwise by function, groups written": ([("first", 12)], []),
    "shuffle, sizes computed": ([("first", 16)], []),
    "shuffle, slots written": ([("first", 4)], []),  # flattened at the end: not seen as a shuffle
    "shuffle, slots written, groups computed": ([("first", 16)], []),
    "shuffle, sizes written": ([("first", 16)], []),
    "split, size computed": ([("first", 16)], []),
    "split, size written": ([("first", 16)], []),
    "split, uneven": ([("first", 16)], []),
    "slice written": ([("first", 16)], []),
    "channels padded, then added": ([("first", 16), ("inner", 4)], []),
    "channels padded up to a number": ([("first", 16), ("inner", 4)], []),
    "channels cropped": ([("first", 5), ("first#2", 11)], []),
    "instance norm over groups": ([("first", 4)], []),
    "a tensor that is no parameter": ([("first", 16)], []),
    "attention of PyTorch": ([("first", 8), ("mix.in_proj_weight", 2)], []),
    "weight norm": ([("first", 8), ("inner.parametrizations.weight.original1", 12)], []),
}


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("name", CASES)
def test_small_net(name: str, form: Form):
    build, shapes, groups, fragments = CASES[name]
    if form == "graph":
        groups, fragments = IN_GRAPH.get(name, (groups, fragments))
    graph = assert_exact(build, shapes, range(2 if form == "module" else 1), form)
    assert [(g.name, g.channels, *([g.inexact] if g.inexact else [])) for g in graph.groups] == groups
    for fragment in fragments:
        assert any(fragment in reason for reason in reasons(graph)), fragment
    for reason in reasons(graph):
        assert any(fragment in reason for fragment in fragments), reason
        assert form == "module" or not reason.endswith(FOLLOWS_NOT)


def test_what_is_tied_stays_tied():
    model = nets.tied_parameter()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    assert graph.aliases == {
        "two.weight": "one.weight", "norm2.weight": "norm1.weight", "norm2.running_mean": "norm1.running_mean"
    }  # fmt: skip
    small = removed(model, graph, random_keep(graph, 0))
    assert small.one.weight is small.two.weight
    assert small.norm1.weight is small.norm2.weight
    assert small.norm1.running_mean is small.norm2.running_mean
    assert small.one.weight.shape == (8, 6, 3, 3)
    shared = nets.tied_module()
    graph = trace(shared, torch.zeros(1, 3, 8, 8))
    small = removed(shared, graph, random_keep(graph, 0))
    assert small.one is small.two
    assert small.one.weight.shape == (6, 6, 3, 3)


@pytest.mark.parametrize("form", WHOLE)
def test_option_a(form: Form):
    """One stream of 16 channels runs through the zero-padded shortcuts; the others join in the middle of the net."""
    graph = assert_exact(resnet20, [(1, 3, 16, 16)], form=form)
    assert [group.channels for group in graph.groups] == [16, 16, 16, 16, 32, 16, 32, 32, 64, 32, 64, 64]
    assert sum(group.channels for group in graph.groups) == 16 + 3 * (16 + 32 + 64) + 16 + 32
    assert reasons(graph) == set()


@pytest.mark.parametrize("form", WHOLE)
def test_mobilenet_v1(form: Form):
    graph = assert_exact(mobilenet_v1_025, [(1, 3, 64, 64)], form=form)
    assert [group.channels for group in graph.groups] == [8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256]
    assert reasons(graph) == set()
