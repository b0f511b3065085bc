"""One net for every kind of rule, small enough to say by hand which channels are coupled, and what stays and why."""

import json

import pytest
import torch
import torch.nn.functional as F
from checks import OUTPUT
from nets import Net, conv
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import Graph, mends, removed, rule, self_check, trace
from convpare.graph.rules import RULES

FIXED = "combines them with a tensor of fixed size"


def graph_of(forward, shape: tuple[int, ...] = (2, 3, 8, 8), **parts: nn.Module | Tensor) -> Graph:
    return trace(Net(forward, **parts), torch.zeros(shape))


def between(middle, channels: int, after: int, **parts: nn.Module | Tensor) -> Graph:
    """The graph of conv a (3 → `channels`), `middle`, conv z (`after` → 2)."""
    return graph_of(lambda net, x: net.z(middle(net, net.a(x))), a=conv(3, channels), z=conv(after, 2), **parts)


def units(graph: Graph, name: str, axis: int = 0) -> list[int]:
    return graph.units[name, axis].tolist()


def groups(graph: Graph) -> list[tuple]:
    return [(g.name, g.channels, g.producers, g.consumers) for g in graph.groups]


def frozen(graph: Graph) -> dict[str, list[tuple[int, str]]]:
    """Layer → what stays there, the model's output aside."""
    found: dict[str, list[tuple[int, str]]] = {}
    for f in graph.frozen:
        if f.reason != OUTPUT:
            found.setdefault(f.layer, []).append((f.channels, f.reason))
    return found


def test_every_kind_of_rule_has_its_test_here():
    kinds = {f.__name__ for f in RULES.values() if f.__module__ == "convpare.graph.rules"}
    assert {kind for kind in kinds if f"test_{kind}" not in globals()} == set()


# ------------------------------------------------------------------------------------------- convolution and linear


def test_convolution():
    graph = between(lambda net, y: net.g(y), 4, 6, g=conv(4, 6, 3, groups=2))
    assert units(graph, "a.weight") == units(graph, "a.bias") == [0, 1, 0, 1]  # slots alike in both groups
    assert units(graph, "g.weight", 1) == [0, 1]
    assert units(graph, "g.weight") == units(graph, "g.bias") == units(graph, "z.weight", 1) == [2, 3, 4, 2, 3, 4]
    assert groups(graph) == [("a", 2, ("a",), ("g",)), ("g", 3, ("g",), ("z",))]
    assert set(graph.units) == {
        ("a.weight", 0), ("a.bias", 0), ("g.weight", 1), ("g.weight", 0), ("g.bias", 0), ("z.weight", 1)
    }  # fmt: skip
    assert [(f.layer, f.channels, f.reason) for f in graph.frozen] == [("z", 2, OUTPUT)]
    layer = graph.layer("g")
    assert (layer.kind, layer.weight, layer.bias, layer.groups) == ("conv", "g.weight", "g.bias", 2)
    assert (layer.out, layer.into) == (("g.weight", 0), ("g.weight", 1))
    assert (layer.positions, layer.outputs) == (2 * 6 * 6, 2 * 6 * 6)


def test_convolution_depthwise_with_multiplier():
    graph = between(lambda net, y: net.d(y), 3, 6, d=conv(3, 6, groups=3, bias=False))
    assert units(graph, "a.weight") == [0, 1, 2]
    assert units(graph, "d.weight") == units(graph, "z.weight", 1) == [0, 0, 1, 1, 2, 2]
    assert ("d.weight", 1) not in graph.units
    assert groups(graph) == [("a", 3, ("a", "d"), ("z",))]


def test_convolution_of_an_image_without_batch():
    graph = trace(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)), torch.zeros(3, 5, 5))
    assert groups(graph) == [("0", 4, ("0",), ("2",))]
    assert graph.layer("0").positions == 25


def test_convolution_with_a_computed_kernel():
    """The channels that the kernel reads stay; its own are no layer's, and not counted."""
    graph = between(lambda net, y: F.conv2d(y, net.k + net.k.flip(2)), 4, 5, k=torch.zeros(5, 4, 3, 3))
    assert groups(graph) == [("a", 4, ("a",), ())]
    assert graph.not_counted == {"conv2d with a computed weight": 1}
    hidden = between(lambda net, y: F.conv2d(y, torch.cumsum(net.k, 0)), 4, 5, k=torch.zeros(5, 4, 3, 3))
    assert frozen(hidden) == {"a": [(4, "the weight of conv2d in Net is computed in a way that hides its channels")]}


def test_transposed_convolution():
    up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
    graph = between(lambda net, y: net.t(y), 4, 6, t=up)
    assert units(graph, "a.weight") == units(graph, "t.weight", 0) == [0, 1, 0, 1]
    assert units(graph, "t.weight", 1) == [2, 3, 4]
    assert units(graph, "t.bias") == units(graph, "z.weight", 1) == [2, 3, 4, 2, 3, 4]
    layer = graph.layer("t")
    assert (layer.kind, layer.out, layer.into) == ("conv_transpose", ("t.weight", 1), ("t.weight", 0))
    assert (layer.positions, layer.outputs) == (2 * 64, 2 * 256)


def test_transposed_convolution_depthwise():
    graph = between(lambda net, y: net.t(y), 4, 2, t=nn.ConvTranspose2d(4, 2, 3, groups=2))
    assert units(graph, "a.weight") == units(graph, "t.weight", 0) == [0, 0, 1, 1]  # a group goes with both its inputs
    assert units(graph, "t.bias") == units(graph, "z.weight", 1) == [0, 1]
    assert groups(graph) == [("a", 2, ("a",), ("t", "z"))]


def test_linear():
    graph = graph_of(
        lambda net, x: net.out(F.relu(net.hidden(net.a(x).flatten(1)))),
        (2, 3, 1, 2), a=conv(3, 4), hidden=nn.Linear(8, 5), out=nn.Linear(5, 3),
    )  # fmt: skip
    assert units(graph, "hidden.weight", 1) == [0, 0, 1, 1, 2, 2, 3, 3]  # two positions of each channel
    assert units(graph, "hidden.weight", 0) == units(graph, "hidden.bias") == units(graph, "out.weight", 1)
    assert units(graph, "out.weight", 1) == [4, 5, 6, 7, 8]
    assert (graph.layer("hidden").kind, graph.layer("hidden").positions) == ("linear", 2)


def test_linear_over_another_axis_than_the_channels():
    graph = graph_of(lambda net, x: net.z(net.mix(net.a(x))), a=conv(3, 4), mix=nn.Linear(8, 6), z=conv(4, 2))
    assert groups(graph) == [("a", 4, ("a",), ("z",))]
    assert frozen(graph) == {"mix": [(6, "conv2d in z mixes an axis of them that is not its channel axis")]}
    assert graph.layer("mix").positions == 2 * 4 * 8


# ---------------------------------------------------------------------------------------------------- normalisation


def test_per_channel():
    parts = {"bn": nn.BatchNorm2d(4), "act": nn.PReLU(4), "norm": nn.InstanceNorm2d(4, affine=True), "one": nn.PReLU()}
    graph = between(lambda net, y: net.one(net.norm(net.act(net.bn(y)))), 4, 4, **parts)
    same = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "act.weight", "norm.weight", "norm.bias"]
    assert all(units(graph, name) == [0, 1, 2, 3] for name in same)
    assert ("one.weight", 0) not in graph.units
    assert groups(graph) == [("a", 4, ("a",), ("z",))]


def test_per_channel_of_the_input():
    graph = graph_of(lambda net, x: net.z(net.a(net.bn(x))), bn=nn.BatchNorm2d(3), a=conv(3, 4), z=conv(4, 2))
    assert ("bn.weight", 0) not in graph.units
    assert groups(graph) == [("a", 4, ("a",), ("z",))]


def test_per_channel_statistics_over_the_channels():
    """Batch norm in evaluation mode is element by element; statistics of the instance are not."""

    def by(norm):
        return between(lambda net, y: norm(net, y.flatten(1)[:, None]).view(y.shape), 4, 4, bn=nn.BatchNorm1d(1))

    assert groups(by(lambda net, flat: net.bn(flat))) == [("a", 4, ("a",), ("z",))]
    assert frozen(by(lambda net, flat: F.instance_norm(flat))) == {
        "a": [(4, "instance_norm in Net averages over them")]
    }


def test_norms_without_parameters_say_how_many_channels_they_take():
    model = nn.Sequential(conv(3, 6), nn.InstanceNorm2d(6), conv(6, 2))
    graph = trace(model, torch.zeros(2, 3, 4, 4))
    keep = graph.keep_all()
    keep[[1, 4]] = False
    assert removed(model, graph, keep)[1].num_features == 4
    assert model[1].num_features == 6


def test_layer_norm():
    graph = between(lambda net, y: net.n(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 4, 4, n=nn.LayerNorm(4))
    reason = "layer_norm in n (layer norm) was built for a fixed number of channels and averages over them"
    assert (groups(graph), frozen(graph)) == ([], {"a": [(4, reason)]})
    over_width = between(lambda net, y: net.n(y), 4, 4, n=nn.LayerNorm(8))
    assert groups(over_width) == [("a", 4, ("a",), ("z",))]


def test_group_norm():
    graph = between(lambda net, y: net.n(y), 4, 4, n=nn.GroupNorm(2, 4))
    assert (groups(graph), frozen(graph)) == ([], {"a": [(4, "group_norm in n (group norm) averages over channels")]})


def test_softmax():
    over_channels = between(lambda net, y: y.softmax(1), 4, 4)
    assert frozen(over_channels) == {"a": [(4, "softmax in Net takes a softmax over them")]}
    over_width = between(lambda net, y: F.log_softmax(y, -1), 4, 4)
    assert groups(over_width) == [("a", 4, ("a",), ("z",))]


# ------------------------------------------------------------------------------------------------ pointwise operators


def test_unary():
    graph = between(lambda net, y: F.hardswish(F.silu(y).sigmoid_().contiguous().clone()), 4, 4)
    assert groups(graph) == [("a", 4, ("a",), ("z",))]
    assert (units(graph, "a.weight"), units(graph, "z.weight", 1)) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_pointwise():
    graph = between(lambda net, y: y + net.b(y) * net.s, 4, 4, b=conv(4, 4), s=torch.zeros(1, 4, 1, 1))
    assert units(graph, "s", 1) == units(graph, "b.weight", 0) == units(graph, "b.weight", 1) == [0, 1, 2, 3]
    assert groups(graph) == [("a", 4, ("a", "b"), ("b", "z"))]


def test_pointwise_with_what_has_no_channels():
    with_input = graph_of(lambda net, x: net.z(net.a(x) + x), a=conv(3, 3), z=conv(3, 2))
    assert frozen(with_input) == {"a": [(3, f"add in Net {FIXED}")]}
    with_number = between(lambda net, y: 2 * y + 1, 4, 4)
    assert groups(with_number) == [("a", 4, ("a",), ("z",))]
    with_one_channel = between(lambda net, y: y * net.g(y), 4, 4, g=conv(4, 1))
    assert groups(with_one_channel) == [("a", 4, ("a",), ("g", "z"))]


def test_pointwise_clamp_by_a_tensor():
    graph = between(lambda net, y: torch.clamp(y, min=net.floor), 4, 4, floor=torch.zeros(4, 1, 1))
    assert units(graph, "floor") == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------------- pooling, spatial resize


def test_spatial():
    def resize(net: Net, y: Tensor) -> Tensor:
        return F.interpolate(F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(y, 2), 2), 1), scale_factor=4)

    assert groups(between(resize, 4, 4)) == [("a", 4, ("a",), ("z",))]
    over = between(lambda net, y: F.max_pool1d(y.flatten(2).transpose(1, 2), 2).transpose(1, 2)[..., None], 4, 2)
    assert frozen(over) == {"a": [(4, "max_pool1d in Net pools or resizes the axis that they lie on")]}


def test_spatial_with_values_and_indices():
    graph = between(lambda net, y: F.adaptive_max_pool2d(y, 2), 4, 4)
    assert groups(graph) == [("a", 4, ("a",), ("z",))]


def test_reduction():
    kept = graph_of(lambda net, x: net.z(net.a(x).mean((2, 3))), a=conv(3, 4), z=nn.Linear(4, 2))
    assert groups(kept) == [("a", 4, ("a",), ("z",))]
    assert units(kept, "z.weight", 1) == [0, 1, 2, 3]
    for reduce, name in [(lambda y: y.amax(1, keepdim=True), "amax"), (lambda y: y.mean(dim=1)[:, None], "mean"),
                         (lambda y: y.std(unbiased=False).expand(2, 1, 8, 8), "std")]:  # fmt: skip
        graph = between(lambda net, y, reduce=reduce: reduce(y), 4, 1)
        assert frozen(graph) == {"a": [(4, f"{name} in Net reduces over them")]}


def test_pad():
    spatial = between(lambda net, y: F.pad(F.pad(y, (1, 0, 2, 1), value=3.0), (1, 1, 1, 1), mode="circular"), 4, 4)
    assert groups(spatial) == [("a", 4, ("a",), ("z",))]
    graph = between(lambda net, y: net.b(y) + F.pad(y, (0, 0, 0, 0, 1, 2)), 3, 6, b=conv(3, 6))
    assert units(graph, "b.weight", 0) == units(graph, "z.weight", 1) == [-1, 0, 1, 2, -1, -1]
    assert frozen(graph) == {"b": [(3, "pad in Net pads channels by a number written in its forward")]}
    cropped = between(lambda net, y: F.pad(y, (0, 0, 0, 0, -1, 0)), 4, 3)
    assert frozen(cropped) == {"a": [(4, "pad in Net crops channels by a number written in its forward")]}


def test_pad_with_copies_of_channels():
    graph = between(lambda net, y: F.pad(y.movedim(1, 3), (1, 1, 0, 0), mode="reflect").movedim(3, 1), 4, 6)
    assert frozen(graph) == {"a": [(4, "pad in Net pads the axis that they lie on with copies of them")]}


# ----------------------------------------------------------------------------------- data movement, executed on labels


def test_cat():
    graph = graph_of(
        lambda net, x: net.z(torch.cat([net.b(x), x, net.a(x), net.b(x)], 1)), a=conv(3, 2), b=conv(3, 4), z=conv(13, 2)
    )
    assert groups(graph) == [("b", 4, ("b",), ("z",)), ("a", 2, ("a",), ("z",))]
    assert units(graph, "z.weight", 1) == [0, 1, 2, 3, -1, -1, -1, 4, 5, 0, 1, 2, 3]
    beside = graph_of(
        lambda net, x: net.z(torch.cat([net.a(x), net.b(x)], 3)), a=conv(3, 4), b=conv(3, 4), z=conv(4, 2)
    )
    assert groups(beside) == [("a", 4, ("a", "b"), ("z",))]
    with_input = graph_of(lambda net, x: net.z(torch.cat([net.a(x), x], 2)), a=conv(3, 3), z=conv(3, 2))
    assert frozen(with_input) == {"a": [(3, "cat in Net puts them beside a tensor of fixed size")]}


def test_move():
    def there_and_back(net: Net, y: Tensor) -> Tensor:
        return y.permute(2, 0, 3, 1).transpose(0, 1).movedim(-1, 1).unsqueeze(2).squeeze(2)

    graph = between(there_and_back, 4, 4)
    assert units(graph, "z.weight", 1) == [0, 1, 2, 3]
    assert frozen(graph) == {}


def test_reshape():
    def shuffled(net: Net, y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)

    graph = between(shuffled, 6, 6)
    assert units(graph, "a.weight") == [0, 1, 2, 0, 1, 2]
    assert units(graph, "z.weight", 1) == [0, 0, 1, 1, 2, 2]
    reason = "view in Net reshapes them to sizes written in its forward"
    for sizes in [(2, 3, 8, 8), (-1, 3, 8, 8)]:  # the second does not raise with fewer channels, and is wrong
        written = between(lambda net, y, sizes=sizes: y.view(2, *sizes).transpose(1, 2).flatten(1, 2), 6, 6)
        assert frozen(written) == {"a": [(6, reason)]}


def test_reshape_expands():
    graph = between(lambda net, y: y * net.g(y.mean((2, 3), keepdim=True)).expand_as(y), 4, 4, g=conv(4, 4))
    assert groups(graph) == [("a", 4, ("a", "g"), ("g", "z"))]
    written = between(lambda net, y: net.g(y.mean((2, 3), keepdim=True)).expand(2, 4, 8, 8), 4, 4, g=conv(4, 4))
    assert frozen(written) == {"g": [(4, "expand in Net reshapes them to sizes written in its forward")]}


def test_pick():
    spatial = between(lambda net, y: y[:, :, 1:, ::2].flip(2).roll(1, 3).narrow(2, 0, 2), 4, 4)
    assert groups(spatial) == [("a", 4, ("a",), ("z",))]
    whole = between(lambda net, y: y[:, 0:], 4, 4)
    assert groups(whole) == [("a", 4, ("a",), ("z",))]
    for take, name, after in [(lambda y: y[:, :3], "slice", 3), (lambda y: y[:, 1:2], "slice", 1),
                              (lambda y: y.roll(1, 1), "roll", 4), (lambda y: y.flip(1), "flip", 4)]:  # fmt: skip
        graph = between(lambda net, y, take=take: take(y), 4, after)
        assert frozen(graph) == {"a": [(4, f"{name} in Net picks channels by numbers written in its forward")]}
    computed = between(lambda net, y: y.index_select(1, torch.arange(3)), 4, 3)
    assert frozen(computed) == {"a": [(4, "index_select in Net picks channels by computed positions")]}


def test_split():
    graph = between(lambda net, y: torch.cat(y.chunk(3, 1)[::-1], 1), 6, 6)
    assert units(graph, "a.weight") == units(graph, "z.weight", 1) == [0, 1, 0, 1, 0, 1]
    computed = between(lambda net, y: torch.cat(y.split(y.shape[1] // 2, 1)[::-1], 1), 6, 6)
    assert units(computed, "a.weight") == [0, 1, 2, 0, 1, 2]
    heads = between(lambda net, y: y.unflatten(1, (2, y.shape[1] // 2)).unbind(1)[1], 6, 3)
    assert units(heads, "z.weight", 1) == [0, 1, 2]
    written = "splits them into parts of"
    for parts, reason in [
        (lambda y: y.split([4, 2], 1), f"split_with_sizes in Net {written} sizes written in its forward"),
        (lambda y: y.split(3, 1), f"split in Net {written} a size written in its forward"),
        (lambda y: [p[:, None] for p in y.unbind(1)], "unbind in Net unbinds the axis that they lie on"),
    ]:
        graph = between(lambda net, y, parts=parts: torch.cat(parts(y)[::-1], 1), 6, 6)
        assert frozen(graph) == {"a": [(6, reason)]}


def test_pixel_shuffle():
    graph = between(lambda net, y: F.pixel_shuffle(y, 2), 8, 2)
    assert units(graph, "a.weight") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert units(graph, "z.weight", 1) == [0, 1]


def test_pixel_unshuffle():
    graph = between(lambda net, y: F.pixel_unshuffle(y, 2), 2, 8)
    assert units(graph, "a.weight") == [0, 1]
    assert units(graph, "z.weight", 1) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_channel_shuffle():
    graph = between(lambda net, y: F.channel_shuffle(y, 2), 6, 6)
    assert units(graph, "a.weight") == [0, 1, 2, 0, 1, 2]
    assert units(graph, "z.weight", 1) == [0, 0, 1, 1, 2, 2]


def test_stack():
    graph = graph_of(
        lambda net, x: net.z(torch.stack([net.a(x), net.b(x)], 2).flatten(1, 2)),
        a=conv(3, 3),
        b=conv(3, 3),
        z=conv(6, 2),
    )
    assert groups(graph) == [("a", 3, ("a", "b"), ("z",))]
    assert units(graph, "z.weight", 1) == [0, 0, 1, 1, 2, 2]


# ------------------------------------------------------------------------------------------------- constants and others


def test_constant():
    graph = between(lambda net, y: y + torch.ones(1, 1, 8, 8), 4, 4)
    assert groups(graph) == [("a", 4, ("a",), ("z",))]
    wide = between(lambda net, y: y + torch.ones(4, 1, 1), 4, 4)
    assert frozen(wide) == {"a": [(4, f"add in Net {FIXED}")]}


def test_nothing():
    """A conversion of types brings an assertion of the exporter into the graph, which reads the tensor."""
    graph = between(lambda net, y: y.double().float(), 4, 4)
    assert groups(graph) == [("a", 4, ("a",), ("z",))]


def test_unknown_operator_freezes_and_is_named():
    graph = between(lambda net, y: torch.cumsum(y, 3), 4, 4)
    assert groups(graph) == []
    assert frozen(graph) == {"a": [(4, "no rule for operator cumsum in Net on 2×4×8×8")]}
    in_a_module = trace(
        nn.Sequential(conv(3, 4), Net(lambda net, y: torch.cumsum(y, 3)), conv(4, 2)), torch.zeros(1, 3, 8, 8)
    )
    assert frozen(in_a_module) == {"0": [(4, "no rule for operator cumsum in 1 on 1×4×8×8")]}


def test_multiplications_that_are_not_counted_are_named():
    graph = between(lambda net, y: y @ y.transpose(2, 3), 4, 4)
    assert graph.not_counted == {"matmul": 1}
    assert frozen(graph) == {"a": [(4, "no rule for operator matmul in Net on 2×4×8×8")]}


def test_blocks_that_cannot_be_looked_into_are_named():
    """A convolution under autocast stands in no list of layers; the count says that something is missing."""

    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = net.b(net.a(x))
        return net.z(y.to(x.dtype))

    graph = graph_of(forward, a=conv(3, 4), b=conv(4, 4), z=conv(4, 2))
    assert graph.not_counted == {"wrap_with_autocast": 1}
    assert [layer.name for layer in graph.layers] == ["z"]
    assert graph.channels == 0


def test_a_rule_of_your_own():
    name = "aten.cumsum"
    try:

        @rule(name)
        def running_sum(t, x, dim, **_):
            t.freeze_axes(x, [dim], f"{t.where} sums over them")
            return type(x)(t.shape, x.off([dim]))

        assert groups(between(lambda net, y: torch.cumsum(y, 3), 4, 4)) == [("a", 4, ("a",), ("z",))]
        over = between(lambda net, y: torch.cumsum(y, 1), 4, 4)
        assert frozen(over) == {"a": [(4, "cumsum in Net sums over them")]}
        with pytest.raises(ConvpareError, match=r"aten\.cumsum has a rule already \(running_sum\)"):
            rule(name)(running_sum)
    finally:
        RULES.pop(name, None)


def test_a_rule_cannot_be_registered_twice():
    before = dict(RULES)
    with pytest.raises(ConvpareError, match=r"operator aten\.relu has a rule already \(unary\)"):
        rule("aten.relu")(lambda t, x: x)
    assert before == RULES


class Widen(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class TaughtWiden(Widen):
    pass


@mends(TaughtWiden)
def _mend_widen(module, keep):
    module.before, module.after = int(keep[: module.before].sum()), int(keep[len(keep) - module.after :].sum())


@pytest.mark.parametrize(("kind", "count"), [(Widen, 3), (TaughtWiden, 6)])
def test_mends(kind: type[Widen], count: int):
    """A padding module of the user's own keeps its channels in place until it is taught."""
    torch.manual_seed(0)
    net = Net(
        lambda net, x: net.z(F.relu(net.b(net.a(x)) + net.pad(net.a(x)))),
        a=conv(3, 3), b=conv(3, 6), z=conv(6, 2), pad=kind(1, 2),
    )  # fmt: skip
    graph = trace(net, torch.zeros(1, 3, 4, 4))
    assert graph.channels == count
    stays = "pad in pad pads channels by a number written in its forward"
    assert frozen(graph) == ({"b": [(3, stays)]} if kind is Widen else {})
    keep = graph.keep_all()
    keep[0] = False
    if kind is TaughtWiden:
        assert [(g.name, g.channels) for g in graph.groups] == [("a", 3), ("b", 3)]
        assert units(graph, "b.weight") == [3, 0, 1, 2, 4, 5]
        keep[[3, 5]] = False
    small = removed(net, graph, keep)
    assert (small.pad.before, small.pad.after) == ((0, 1) if kind is TaughtWiden else (1, 2))
    assert self_check(net, graph, keep).passed


# ---------------------------------------------------------------------------------------------------------- the graph


def test_graph_as_data():
    graph = between(lambda net, y: y.relu(), 4, 4)
    data = json.loads(json.dumps(graph.to_json()))
    assert data["model"] == "Net"
    assert data["inputs"] == [[2, 3, 8, 8]]
    assert data["groups"] == [{"name": "a", "channels": 4, "producers": ["a"], "consumers": ["z"]}]
    assert data["layers"] == [{"name": "a", "kind": "conv", "weight": [4, 3, 1, 1]},
                              {"name": "z", "kind": "conv", "weight": [2, 4, 1, 1]}]  # fmt: skip
    assert data["frozen"] == [{"layer": "z", "channels": 2, "reason": OUTPUT}]
    keep = graph.keep_all()
    keep[1] = False
    assert graph.kept(("a.weight", 0), keep).tolist() == graph.kept(("z.weight", 1), keep).tolist() == [0, 2, 3]
    assert graph.kept(("z.weight", 0), keep).tolist() == [0, 1]
    with pytest.raises(ConvpareError, match=r"no layer 'b' in Net; its layers are a, z"):
        graph.layer("b")
    with pytest.raises(ConvpareError, match=r"no group 'z' in Net; its groups are a"):
        graph.group("z")


def test_channel_units():
    """The removable channel at every channel that a layer reads or makes, also where its kernel shares slots."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 16, 3, groups=8),
        nn.ConvTranspose2d(16, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 3, groups=2), nn.Conv2d(2, 1, 1),
        nn.Conv2d(1, 5, 1),
    )  # fmt: skip
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    made = [graph.channel_units(layer, reads_input=False).tolist() for layer in graph.layers]
    read = [graph.channel_units(layer, reads_input=True).tolist() for layer in graph.layers]
    assert [graph.is_depthwise(layer) for layer in graph.layers] == [False, False, True, False, True, False, False]
    assert made[0] == [0, 1, 0, 1]
    assert made[1] == [2, 3, 4, 5, 2, 3, 4, 5]
    assert made[2] == [2, 2, 3, 3, 4, 4, 5, 5, 2, 2, 3, 3, 4, 4, 5, 5]
    assert made[3] == [6, 6, 6, 6]  # the next layer sums pairs, and this one makes the pairs alike
    assert made[4] == [6, 6]
    assert made[5:] == [[-1], [-1] * 5]
    assert read[0] == [-1, -1, -1]
    assert read[1:] == made[:-1]
    assert [graph.is_inner(group) for group in graph.groups] == [True, True, True]
    stream = between(lambda net, y: y + net.b(y), 4, 4, b=conv(4, 4))
    assert [stream.is_inner(group) for group in stream.groups] == [False]


def test_groups_are_numbered_in_the_order_of_execution_and_named_apart():
    """Channels of one layer that differ in what reads them are groups of their own."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.z(torch.cat([y, net.b(y)], 1)) + net.w(torch.cat([net.c(x), y + net.d(x)], 1)[:, :, :4, :4]).sum()

    graph = graph_of(forward, a=conv(3, 4), b=conv(4, 5), c=conv(3, 2), d=conv(3, 4), z=conv(9, 1), w=conv(6, 1))
    assert [(g.name, g.channels, g.start) for g in graph.groups] == [("a", 4, 0), ("b", 5, 4), ("c", 2, 9)]
    assert graph.group("b").units == slice(4, 9)
    halves = graph_of(
        lambda net, x: net.z(F.pad(net.a(x), (0, 0, 0, 0, 0, 2)) + net.b(x)) + net.w(net.b(x)),
        a=conv(3, 2), b=conv(3, 4), z=conv(4, 1), w=conv(4, 1),
    )  # fmt: skip
    assert groups(halves) == [("a", 2, ("a", "b"), ("z", "w"))]
    parts = graph_of(
        lambda net, x: net.z(net.a(x) + torch.cat([net.b(x), net.c(x)], 1)), a=conv(3, 5), b=conv(3, 2), c=conv(3, 3),
        z=conv(5, 1),
    )  # fmt: skip
    assert groups(parts) == [("a", 2, ("a", "b"), ("z",)), ("a#2", 3, ("a", "c"), ("z",))]
