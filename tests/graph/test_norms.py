"""Normalisations: which entries of their parameters go with which channels, and whose removal changes the others."""

import pytest
import torch
import torch.nn.functional as F
from checks import FOLLOWS_NOT, WHOLE, between, frozen, graph_of, groups, marked, random_keep, units
from nets import Net, StandardisedConv, conv
from torch import Tensor, nn

from convpare.graph import removed, self_check, trace
from convpare.graph.structure import Form

ALONE = [("a", 4, ("a",), ("z",))]
forms = pytest.mark.parametrize("form", WHOLE)


def last(norm: nn.Module, y: Tensor) -> Tensor:
    """A norm over the last axis, on channels."""
    return norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------- channel by channel


@forms
def test_per_channel(form: Form):
    parts = {"bn": nn.BatchNorm2d(4), "act": nn.PReLU(4), "norm": nn.InstanceNorm2d(4, affine=True), "one": nn.PReLU()}
    graph = between(lambda net, y: net.one(net.norm(net.act(net.bn(y)))), 4, 4, form, **parts)
    same = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "act.weight", "norm.weight", "norm.bias"]
    assert all(units(graph, name) == [0, 1, 2, 3] for name in same)
    assert ("one.weight", 0) not in graph.units
    assert (groups(graph), marked(graph)) == (ALONE, {})


def test_per_channel_of_the_input():
    graph = graph_of(lambda net, x: net.z(net.a(net.bn(x))), bn=nn.BatchNorm2d(3), a=conv(3, 4), z=conv(4, 2))
    assert ("bn.weight", 0) not in graph.units
    assert groups(graph) == ALONE


@forms
def test_per_channel_statistics_over_the_channels(form: Form):
    """Batch norm in evaluation mode is element by element; statistics of the instance are not."""

    def by(norm):
        return between(lambda net, y: norm(net, y.flatten(1)[:, None]).view(y.shape), 4, 4, form, bn=nn.BatchNorm1d(1))

    element_by_element = by(lambda net, flat: net.bn(flat))
    assert (groups(element_by_element), marked(element_by_element)) == (ALONE, {})
    averaged = by(lambda net, flat: F.instance_norm(flat))
    assert (frozen(averaged), marked(averaged)) == ({}, {"a": "instance_norm in Net normalises over them"})


def test_norms_without_parameters_say_how_many_channels_they_take():
    model = nn.Sequential(conv(3, 6), nn.InstanceNorm2d(6), conv(6, 6), nn.GroupNorm(3, 6, affine=False), conv(6, 2))
    graph = trace(model, torch.zeros(2, 3, 4, 4))
    assert [(g.name, g.channels) for g in graph.groups] == [("0", 6), ("2", 3)]
    keep = graph.keep_all()
    keep[[1, 4, 7]] = False
    small = removed(model, graph, keep)
    assert small[1].num_features == 4
    assert (small[3].num_groups, small[3].num_channels) == (2, 4)
    assert (model[1].num_features, model[3].num_groups, model[3].num_channels) == (6, 3, 6)


@forms
def test_per_channel_instance_norm(form: Form):
    """Statistics of one channel are its own, whether or not the norm has parameters or keeps track."""
    for norm in (nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)):
        graph = between(lambda net, y: net.norm(y), 4, 4, form, norm=norm)
        assert (groups(graph), marked(graph), frozen(graph)) == (ALONE, {}, {})


# ----------------------------------------------------------------------------------------------------------- group norm


@forms
def test_group_norm(form: Form):
    """A whole group of the norm goes, and leaves the others as they are."""
    torch.manual_seed(0)
    model = Net(lambda net, x: net.z(net.n(net.a(x))), a=conv(3, 6), n=nn.GroupNorm(3, 6), z=conv(6, 2))
    graph = trace(model, torch.zeros(2, 3, 8, 8), form)
    assert all(units(graph, name) == [0, 0, 1, 1, 2, 2] for name in ("a.weight", "a.bias", "n.weight", "n.bias"))
    assert units(graph, "z.weight", 1) == [0, 0, 1, 1, 2, 2]
    assert (groups(graph), marked(graph)) == ([("a", 3, ("a",), ("z",))], {})
    keep = graph.keep_all()
    keep[1] = False
    small = removed(model, graph, keep)
    assert self_check(model, graph, keep).passed
    x = torch.randn(2, 3, 8, 8)
    y = F.group_norm(F.conv2d(x, model.a.weight, model.a.bias), 3, model.n.weight, model.n.bias)[:, [0, 1, 4, 5]]
    assert torch.allclose(small(x), F.conv2d(y, model.z.weight[:, [0, 1, 4, 5]], model.z.bias), atol=1e-5)
    if form == "module":
        assert (small.n.num_groups, small.n.num_channels, tuple(small.n.weight.shape)) == (2, 4, (4,))
        assert (model.n.num_groups, model.n.num_channels) == (3, 6)
    else:
        (rewrite,) = graph.rewrites
        assert (rewrite.path, rewrite.count(graph.keep_all()), rewrite.count(keep)) == ((1,), 3, 2)


@forms
def test_group_norm_of_one_group_and_of_one_channel_each(form: Form):
    whole = between(lambda net, y: net.n(y), 4, 4, form, n=nn.GroupNorm(1, 4))
    assert (groups(whole), marked(whole)) == (ALONE, {"a": "group_norm in n normalises over them"})
    each = between(lambda net, y: net.n(y), 4, 4, form, n=nn.GroupNorm(4, 4))
    assert (groups(each), marked(each)) == (ALONE, {})


@forms
def test_group_norm_by_function(form: Form):
    graph = between(lambda net, y: F.group_norm(y, 2), 4, 4, form)
    if form == "module":
        assert frozen(graph) == {"a": [(4, f"group_norm in Net {FOLLOWS_NOT}")]}
    else:
        assert units(graph, "a.weight") == [0, 0, 1, 1]


def test_group_norm_of_the_input():
    graph = graph_of(lambda net, x: net.z(net.a(net.n(x))), n=nn.GroupNorm(1, 3), a=conv(3, 4), z=conv(4, 2))
    assert (groups(graph), marked(graph)) == (ALONE, {})
    assert not {name for name, _ in graph.units} & {"n.weight", "n.bias"}


# ----------------------------------------------------------------------------------------- over channels: inexact


@forms
def test_layer_norm(form: Form):
    graph = between(lambda net, y: last(net.n, y), 4, 4, form, n=nn.LayerNorm(4))
    assert (groups(graph), marked(graph)) == (ALONE, {"a": "layer_norm in n normalises over them"})
    assert units(graph, "n.weight") == units(graph, "n.bias") == [0, 1, 2, 3]
    over_width = between(lambda net, y: net.n(y), 4, 4, form, n=nn.LayerNorm(8))
    assert (groups(over_width), marked(over_width)) == (ALONE, {})
    assert not {name for name, _ in over_width.units} & {"n.weight", "n.bias"}


@forms
def test_layer_norm_over_channels_and_space(form: Form):
    """`normalized_shape` is kept true where it counts channels, and only there."""
    torch.manual_seed(0)
    model = Net(lambda net, x: net.z(net.n(net.a(x))), a=conv(3, 6), n=nn.LayerNorm((6, 8, 8)), z=conv(6, 2))
    graph = trace(model, torch.zeros(2, 3, 8, 8), form)
    assert groups(graph) == [("a", 6, ("a",), ("z",))]
    assert list(marked(graph)) == ["a"]
    assert units(graph, "n.weight") == units(graph, "n.bias") == list(range(6))
    assert {axis for name, axis in graph.units if name == "n.weight"} == {0}
    keep = random_keep(graph, 0, marked=True)
    check = self_check(model, graph, keep)
    assert (check.passed, check.unproved) == (True, ("a",))
    small = removed(model, graph, keep)
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert (shapes["n.weight"], shapes["a.weight"]) == ((4, 8, 8), (4, 3, 1, 1))
    if form == "module":
        assert small.n.normalized_shape == (4, 8, 8)
        assert model.n.normalized_shape == (6, 8, 8)


@forms
def test_layer_norm_that_was_written_by_function(form: Form):
    followed = between(lambda net, y: F.layer_norm(y.movedim(1, -1), (y.shape[1],)).movedim(-1, 1), 4, 4, form)
    assert (groups(followed), list(marked(followed))) == (ALONE, ["a"])
    written = between(lambda net, y: F.layer_norm(y.movedim(1, -1), (4,)).movedim(-1, 1), 4, 4, form)
    if form == "module":
        assert frozen(written) == {"a": [(4, f"layer_norm in Net {FOLLOWS_NOT}")]}
    else:
        assert list(marked(written)) == ["a"]


@forms
def test_layer_norm_by_root_mean_square(form: Form):
    graph = between(lambda net, y: last(net.n, y), 4, 4, form, n=nn.RMSNorm(4))
    assert (groups(graph), marked(graph)) == (ALONE, {"a": "rms_norm in n normalises over them"})
    assert units(graph, "n.weight") == [0, 1, 2, 3]


@forms
def test_inexact_channels_go_when_they_are_told_to(form: Form):
    """The surgery is right: layer norm over what is left."""
    torch.manual_seed(0)
    model = Net(lambda net, x: net.z(last(net.n, net.a(x))), a=conv(3, 4), n=nn.LayerNorm(4), z=conv(4, 2))
    graph = trace(model, torch.zeros(2, 3, 8, 8), form)
    keep = graph.keep_all()
    keep[1] = False
    stays, x = [0, 2, 3], torch.randn(2, 3, 8, 8)
    y = F.conv2d(x, model.a.weight[stays], model.a.bias[stays]).movedim(1, -1)
    y = F.layer_norm(y, (3,), model.n.weight[stays], model.n.bias[stays]).movedim(-1, 1)
    expected = F.conv2d(y, model.z.weight[:, stays], model.z.bias)
    assert torch.allclose(removed(model, graph, keep)(x), expected, atol=1e-5)


@forms
def test_softmax(form: Form):
    over_channels = between(lambda net, y: y.softmax(1), 4, 4, form)
    assert (groups(over_channels), marked(over_channels)) == (ALONE, {"a": "softmax in Net normalises over them"})
    over_width = between(lambda net, y: F.log_softmax(y, -1), 4, 4, form)
    assert (groups(over_width), marked(over_width)) == (ALONE, {})


@forms
def test_softmax_by_hand(form: Form):
    """exp is not zero at zero, so that the sum is inexact."""
    graph = between(lambda net, y: y.exp() / y.exp().sum(1, keepdim=True), 4, 4, form)
    assert marked(graph) == {"a": "sum in Net sums over them"}


@forms
def test_response_norm_pads_and_pools_the_channels(form: Form):
    """`local_response_norm` captures to a padding and a pooling of the channel axis: neighbours, so all stay."""
    graph = between(lambda net, y: F.local_response_norm(y, 3), 4, 4, form)
    (reason,) = {reason for _, reason in frozen(graph)["a"]}
    assert reason in {
        f"{pool} in Net pools or resizes the axis that they lie on" for pool in ("avg_pool2d", "avg_pool3d")
    }


@forms
def test_normalised_to_length_one(form: Form):
    """F.normalize: a zeroed channel adds nothing to the norm."""
    graph = between(lambda net, y: F.normalize(y, dim=1), 4, 4, form)
    assert (groups(graph), marked(graph)) == (ALONE, {})


# ------------------------------------------------------------------------------------------------- computed weights


@forms
@pytest.mark.parametrize("style", ["old", "parametrization"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:The tensor attribute self.c")
def test_weight_norm(form: Form, style: str):
    """One norm for each output channel: these go freely, the input channels change it; folded, all go freely."""
    torch.manual_seed(0)
    wrap = nn.utils.weight_norm if style == "old" else nn.utils.parametrizations.weight_norm
    model = Net(lambda net, x: net.z(net.c(net.a(x))), a=conv(3, 4), c=wrap(conv(4, 5, 3)), z=conv(5, 2))
    if style == "old":
        names, owner = ("c.weight_g", "c.weight_v"), "c"
    else:
        owner = "c.parametrizations.weight.0"
        names = tuple(f"c.parametrizations.weight.original{n}" for n in range(2))
    with torch.no_grad():  # else the old style's weight has a history, and the model can't be copied
        model(torch.zeros(2, 3, 8, 8))
    graph = trace(model, torch.zeros(2, 3, 8, 8), form)
    assert [(g.name, g.channels) for g in graph.groups] == [("a", 4), (names[1], 5)]
    assert units(graph, names[1], 0) == units(graph, "c.bias") == units(graph, "z.weight", 1) == [4, 5, 6, 7, 8]
    assert units(graph, names[1], 1) == [0, 1, 2, 3]
    if form == "module":
        assert marked(graph) == {"a": f"_weight_norm in {owner} normalises the weight over them"}
        assert units(graph, names[0], 0) == [4, 5, 6, 7, 8]
        assert graph.layer(names[1]).computed
    else:
        assert marked(graph) == {}
        assert list(graph.folded) == [names[1]]
    assert self_check(model, graph, random_keep(graph, 0)).passed
    small = removed(model, graph, random_keep(graph, 0, marked=True))
    shapes = {name: tuple(p.shape) for name, p in small.named_parameters()}
    assert shapes[names[1]] == (3, 3, 3, 3)
    assert (names[0] in shapes) == (form == "module")


@forms
def test_weight_norm_over_everything(form: Form):
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5), dim=None)
    graph = graph_of(
        lambda net, x: net.z(net.c(net.a(x).mean((2, 3)))), form=form, a=conv(3, 4), c=linear, z=nn.Linear(5, 2)
    )
    assert [g.channels for g in graph.groups] == [4, 5]
    assert len(marked(graph)) == (2 if form == "module" else 0)


@forms
def test_standardised_weight(form: Form):
    """Every output channel's kernel has mean 0 and variance 1: input channels are averaged over, until it is folded."""
    torch.manual_seed(0)
    model = Net(lambda net, x: net.z(net.c(net.a(x))), a=conv(3, 4), c=StandardisedConv(4, 5, 3), z=conv(5, 2))
    graph = trace(model, torch.zeros(2, 3, 8, 8), form)
    assert [(g.name, g.channels) for g in graph.groups] == [("a", 4), ("c", 5)]
    assert units(graph, "c.weight", 0) == units(graph, "z.weight", 1) == [4, 5, 6, 7, 8]
    assert units(graph, "c.weight", 1) == [0, 1, 2, 3]
    assert frozen(graph) == {}
    if form == "module":
        assert list(marked(graph)) == ["a"]
        assert units(graph, "c.gain") == [4, 5, 6, 7, 8]
    else:
        assert marked(graph) == {}
    keep = random_keep(graph, 0)
    assert self_check(model, graph, keep).passed


def test_standardised_weight_times_its_gain():
    model = Net(
        lambda net, x: net.z(net.c(net.a(x))), a=conv(3, 4), c=StandardisedConv(4, 5, 3, gain_first=True), z=conv(5, 2)
    )
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    assert [(g.name, g.channels) for g in graph.groups] == [("a", 4), ("c", 5)]


@forms
@pytest.mark.parametrize("bias", [False, True])
def test_a_filter_that_all_channels_share_does_not_switch_them_off(bias: bool, form: Form):
    """Nor does a bias: what a norm over them sees of a zeroed channel is not zero."""

    def middle(net, y):
        filters, channels = net.filter.expand(y.shape[1], -1, -1, -1), y.shape[1]
        y = (
            F.conv2d(y, filters, net.shift.expand(channels), groups=channels)
            if bias
            else (F.conv2d(1 - y, filters, groups=channels))
        )
        return F.normalize(y, dim=1)

    parts = {"filter": torch.randn(1, 1, 3, 3), "shift": torch.randn(1)}
    assert list(marked(between(middle, 4, 4, form, **parts))) == ["a"]
