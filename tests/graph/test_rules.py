"""One net for every kind of rule, small enough to say by hand which channels are coupled, and what stays and why."""

import json
from collections.abc import Callable

import pytest
import test_contraction
import test_norms
import torch
import torch.nn.functional as F
from checks import FIXED, FOLLOWS_NOT, OUTPUT, WHOLE, between, frozen, graph_of, groups, marked, random_keep, units
from nets import Net, conv
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import mends, removed, rule, self_check, trace
from convpare.graph.rules import RULES
from convpare.graph.structure import Form
from convpare.planning.cost import count


def test_every_kind_of_rule_has_its_test():
    kinds = {f.__name__ for f in RULES.values() if f.__module__.startswith("convpare.graph.rules.")}
    assert len(kinds) > 30
    known = {*globals(), *vars(test_norms), *vars(test_contraction)}
    assert {kind for kind in kinds if f"test_{kind}" not in known} == set()


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
    """Computed element by element it is a layer all the same; else its channels are hidden, and it is not counted."""
    graph = between(lambda net, y: F.conv2d(y, net.k + net.k.flip(2)), 4, 5, k=torch.zeros(5, 4, 3, 3))
    assert groups(graph) == [("a", 4, ("a",), ("k",)), ("k", 5, ("k",), ("z",))]
    assert (graph.layer("k").weight, graph.layer("k").computed, graph.not_counted) == ("k", True, {})
    hidden = between(lambda net, y: F.conv2d(y, net.k.cumprod(0)), 4, 5, k=torch.zeros(5, 4, 3, 3))
    assert frozen(hidden) == {
        "a": [(4, "the weight of conv2d in Net is computed in a way that hides its channels")],
        "k": [(5, "no rule for operator cumprod in Net on 5×4×3×3")],
    }
    assert hidden.not_counted == {}
    of_two = between(
        lambda net, y: F.conv2d(y, net.k + net.s), 4, 5, k=torch.zeros(5, 4, 3, 3), s=torch.zeros(5, 4, 3, 3)
    )
    assert of_two.not_counted == {"conv2d with a computed weight": 1}
    assert groups(of_two) == [("a", 4, ("a",), ())]


def test_convolution_with_a_computed_kernel_in_the_graph_form():
    """Computed from parameters alone it becomes a plain one; computed from an activation it does not."""
    graph = between(lambda net, y: F.conv2d(y, net.k.cumprod(0)), 4, 5, "graph", k=torch.zeros(5, 4, 3, 3))
    assert groups(graph) == [("a", 4, ("a",), ("k",)), ("k", 5, ("k",), ("z",))]
    assert (list(graph.folded), graph.layer("k").computed, graph.not_counted) == (["k"], False, {})
    by_activation = between(lambda net, y: F.conv2d(y, net.k * y.mean()), 4, 5, "graph", k=torch.zeros(5, 4, 3, 3))
    assert by_activation.folded == {}
    assert marked(by_activation) == {"a": "mean in Net averages over them"}


@pytest.mark.parametrize("form", WHOLE)
def test_convolution_depthwise_with_groups_written(form: Form):
    graph = between(lambda net, y: F.conv2d(y, net.k, groups=3), 3, 6, form, k=torch.zeros(6, 1, 3, 3))
    if form == "module":
        reason = f"conv2d in Net {FOLLOWS_NOT}"
        assert (graph.groups, frozen(graph)) == ((), {"a": [(3, reason)], "k": [(6, reason)]})
    else:
        assert units(graph, "k") == units(graph, "z.weight", 1) == [0, 0, 1, 1, 2, 2]


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


def test_linear_with_a_weight_that_is_transposed():
    graph = graph_of(
        lambda net, x: net.z(F.linear(net.a(x).mean((2, 3)), net.w.t()).relu()),
        a=conv(3, 4), w=torch.zeros(4, 4), z=nn.Linear(4, 2),
    )  # fmt: skip
    made = [layer.out for layer in graph.layers if layer.weight == "w"]
    assert made in ([], [("w", 1)])


def test_linear_over_another_axis_than_the_channels():
    graph = graph_of(lambda net, x: net.z(net.mix(net.a(x))), a=conv(3, 4), mix=nn.Linear(8, 6), z=conv(4, 2))
    assert groups(graph) == []
    assert frozen(graph) == {
        "a": [(4, "linear in mix runs once for each of them")],
        "mix": [(6, "conv2d in z mixes an axis of them that is not its channel axis")],
    }
    assert graph.layer("mix").positions == 2 * 4 * 8


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


def test_pointwise_on_a_part_of_one_channel():
    """A channel alone has no axis to be told by: it stays, the others may go."""
    graph = between(lambda net, y: torch.cat([p * 2 for p in y.split([3, 1], 1)], 1), 4, 4, "graph")
    assert units(graph, "a.weight") == [0, 1, 2, -1]


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


def test_squeeze():
    """Two channels stay, lest the axis goes with the last but one; the graph form names the axes."""
    squeezed = between(lambda net, y: y.mean((2, 3), keepdim=True).squeeze()[:, :, None, None], 5, 5)
    assert units(squeezed, "a.weight") == [-1, -1, 0, 1, 2]
    named = between(lambda net, y: y.mean((2, 3), keepdim=True).squeeze()[:, :, None, None], 5, 5, "graph")
    assert units(named, "a.weight") == [0, 1, 2, 3, 4]


def test_windows():
    over = between(
        lambda net, y: y.unfold(1, 3, 1).flatten(2)[..., :8].unflatten(2, (8, 1)).squeeze(3)[..., None], 4, 2
    )
    assert frozen(over) == {"a": [(4, "unfold in Net lays windows over them")]}
    beside = between(lambda net, y: y.unfold(2, 2, 2)[..., 0], 4, 4)
    assert units(beside, "a.weight") == [0, 1, 2, 3]


def test_gather():
    chosen = between(lambda net, y: y.gather(2, y.argmax(2, keepdim=True)), 4, 4)
    assert units(chosen, "a.weight") == [0, 1, 2, 3]
    among = between(lambda net, y: y.gather(1, y.argmax(1, keepdim=True)), 4, 1)
    assert list(frozen(among)) == ["a"]


@pytest.mark.parametrize("draw", [torch.rand_like, torch.bernoulli, F.dropout])
def test_random(draw: Callable[[Tensor], Tensor]):
    """Numbers that are drawn for fewer channels are others."""
    graph = between(lambda net, y: y * draw(y.sigmoid()), 4, 4)
    assert [(count, "draws random numbers" in reason) for count, reason in frozen(graph)["a"]] == [(4, True)]
    still = between(lambda net, y: F.dropout(y, training=net.training), 4, 4)
    assert units(still, "a.weight") == [0, 1, 2, 3]


def test_reduction():
    """Sums leave zeroed channels out, averages do not; a maximum is neither."""
    kept = graph_of(lambda net, x: net.z(net.a(x).mean((2, 3))), a=conv(3, 4), z=nn.Linear(4, 2))
    assert groups(kept) == [("a", 4, ("a",), ("z",))]
    assert units(kept, "z.weight", 1) == [0, 1, 2, 3]
    for reduce, name in [(lambda y: y.mean(dim=1)[:, None], "mean"), (lambda y: y.var(1, keepdim=True), "var"),
                         (lambda y: y.std(unbiased=False).expand(2, 1, 8, 8), "std"),
                         (lambda y: y.sigmoid().sum(1, keepdim=True), "sum")]:  # fmt: skip
        graph = between(lambda net, y, reduce=reduce: reduce(y), 4, 1)
        does = "sums" if name == "sum" else "averages"
        assert (frozen(graph), marked(graph)) == ({}, {"a": f"{name} in Net {does} over them"})
    for reduce, name in [(lambda y: y.amax(1, keepdim=True), "amax"), (lambda y: y.prod(1, keepdim=True), "prod"),
                         (lambda y: y.logsumexp(1, keepdim=True), "logsumexp"),
                         (lambda y: y.cumsum(1)[:, -1:], "cumsum")]:  # fmt: skip
        graph = between(lambda net, y, reduce=reduce: reduce(y), 4, 1)
        assert frozen(graph) == {"a": [(4, f"{name} in Net reduces over them")]}
    for silent in (lambda y: y, lambda y: 2 * y.relu(), lambda y: y * y.sigmoid(), lambda y: F.pad(y, (1, 1, 1, 1))):
        graph = between(lambda net, y, silent=silent: silent(y).sum(1, keepdim=True), 4, 1)
        assert (groups(graph), marked(graph)) == ([("a", 4, ("a",), ())], {})
    for loud in (lambda y: y + 1, lambda y: y.cos(), lambda y: y.exp(), lambda y: F.pad(y, (1, 1), value=0.5)):
        graph = between(lambda net, y, loud=loud: loud(y).sum(1, keepdim=True), 4, 1)
        assert marked(graph) == {"a": "sum in Net sums over them"}


def test_vector_norm():
    for by in (lambda y: y.norm(dim=1, keepdim=True), lambda y: torch.linalg.vector_norm(y, dim=1, keepdim=True)):
        graph = between(lambda net, y, by=by: y / by(y), 4, 4)
        assert (groups(graph), marked(graph)) == ([("a", 4, ("a",), ("z",))], {})
        graph = between(lambda net, y, by=by: by(y.exp()), 4, 1)
        assert list(marked(graph)) == ["a"]


def test_extremes():
    over_width = between(lambda net, y: torch.max(y.sort(3)[0], y.median(2, keepdim=True)[0]), 4, 4)
    assert groups(over_width) == [("a", 4, ("a",), ("z",))]
    of_two = between(lambda net, y: torch.max(y, net.b(y)), 4, 4, b=conv(4, 4))
    assert groups(of_two) == [("a", 4, ("a", "b"), ("b", "z"))]
    for take, name in [(lambda y: y.max(1, keepdim=True)[0], "max"), (lambda y: y.topk(1, 1)[0], "topk"),
                       (lambda y: y.min().expand(2, 1, 8, 8), "min")]:  # fmt: skip
        graph = between(lambda net, y, take=take: take(y), 4, 1)
        assert frozen(graph) == {"a": [(4, f"{name} in Net reduces over them")]}


# ------------------------------------------------------------------------------- data movement, executed on the labels


EIGHT = list(range(8))
Middle = Callable[[Tensor], Tensor]

# what is done to 8 channels → the units before and after it, and the operator whose number a module form cannot follow
MOVED: dict[str, tuple[Middle, list[int], list[int], str | None]] = {
    "slices": (lambda y: torch.cat([y[:, :3].relu(), y[:, 3:]], 1), EIGHT, EIGHT, "slice"),
    "a slice of all": (lambda y: y[:, 0:], EIGHT, EIGHT, None),
    "a slice in the middle": (lambda y: y[:, 2:7], [0, 1, 3, 4, 5, 6, 7, 2], [3, 4, 5, 6, 7], "slice"),
    "every second": (lambda y: y[:, ::2], [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3], None),
    "narrowed": (
        lambda y: torch.cat([y.narrow(1, 2, 5).relu(), y.narrow(1, 0, 3)], 1),
        [0, 1, 6, 2, 3, 4, 5, 7],  # the third twice, the last nowhere
        [6, 2, 3, 4, 5, 0, 1, 6],
        "narrow",
    ),
    "flipped": (lambda y: y.flip(1), EIGHT, EIGHT[::-1], None),
    "repeated": (lambda y: y.repeat(1, 2, 1, 1), EIGHT, EIGHT + EIGHT, None),
    "each repeated": (lambda y: y.repeat_interleave(2, 1), EIGHT, [n for n in EIGHT for _ in range(2)], None),
    "split": (lambda y: torch.cat(y.split(4, 1)[::-1], 1), EIGHT, [4, 5, 6, 7, 0, 1, 2, 3], "split"),
    "split unevenly": (
        lambda y: torch.cat(y.split([5, 3], 1)[::-1], 1), EIGHT, [5, 6, 7, 0, 1, 2, 3, 4], "split_with_sizes"
    ),
    "unbound": (lambda y: y.unflatten(1, (2, -1)).unbind(1)[1], [0, 1, 2, 3] * 2, [0, 1, 2, 3], None),
    "slots last": (
        lambda y: y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
        [0, 1, 2, 3] * 2,
        [0, 0, 1, 1, 2, 2, 3, 3],
        "unflatten",
    ),
    "slots summed": (lambda y: y.unflatten(1, (-1, 2)).sum(2), [0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3], None),
    "to pictures and back": (
        lambda y: y.reshape(16, 1, 8, 8).relu().reshape(2, 8, 8, 8), EIGHT, EIGHT, "reshape"
    ),
    "cropped": (lambda y: F.pad(y, (0, 0, 0, 0, -1, -2)), [0, 3, 4, 5, 6, 7, 1, 2], [3, 4, 5, 6, 7], "pad"),
    "there and back": (
        lambda y: y.permute(2, 0, 3, 1).transpose(0, 1).movedim(-1, 1).unsqueeze(2).squeeze(2), EIGHT, EIGHT, None
    ),
    "pieces of space": (
        lambda y: y[:, :, 1:, ::2].flip(2).roll(1, 3).narrow(2, 0, 2), EIGHT, EIGHT, None
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("name", MOVED)
def test_moved(name: str, form: Form):
    middle, before, after, operator = MOVED[name]
    torch.manual_seed(0)
    net = Net(lambda net, x: net.z(middle(net.a(x))), a=conv(3, 8), z=conv(len(after), 2))
    graph = trace(net, torch.zeros(2, 3, 8, 8), form)
    assert self_check(net, graph, random_keep(graph, 1)).passed
    if form == "graph" or operator is None:
        assert frozen(graph) == {}
        assert units(graph, "a.weight") == before
        assert units(graph, "z.weight", 1) == after
    else:
        reasons = {reason for _, reason in frozen(graph)["a"]}
        assert reasons == {f"{operator} in Net {FOLLOWS_NOT}"}


def test_moved_chunks_of_the_graph_form_may_become_uneven():
    """`chunk` becomes a split into written sizes; in a module, where it stays, the parts shrink alike."""
    graph = between(lambda net, y: torch.cat(y.chunk(3, 1)[::-1], 1), 8, 8, "graph")
    assert (units(graph, "a.weight"), units(graph, "z.weight", 1)) == (EIGHT, [6, 7, 3, 4, 5, 0, 1, 2])
    module = between(lambda net, y: torch.cat(y.chunk(3, 1)[::-1], 1), 8, 8)
    assert frozen(module) == {"a": [(8, "chunk in Net splits them into parts that are not equal")]}
    for form, before in [("module", [0, 1, 2, 3] * 2), ("graph", EIGHT)]:
        halves = between(lambda net, y: torch.cat([y.chunk(2, 1)[0].relu(), y.chunk(2, 1)[1]], 1), 8, 8, form)
        assert units(halves, "a.weight") == units(halves, "z.weight", 1) == before


def test_move():
    graph = between(lambda net, y: y.permute(0, 2, 3, 1).swapaxes(1, 2).moveaxis(3, 1), 4, 4)
    assert (units(graph, "z.weight", 1), frozen(graph)) == ([0, 1, 2, 3], {})


@pytest.mark.parametrize("form", WHOLE)
def test_reshape(form: Form):
    """A shuffle: in the graph form a choice of positions, in the module the parts shrink alike."""

    def shuffled(net: Net, y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)

    graph = between(shuffled, 6, 6, form)
    if form == "graph":
        assert (units(graph, "a.weight"), units(graph, "z.weight", 1)) == ([0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5])
        (shuffle,) = graph.shuffles
        assert shuffle.positions.tolist() == [0, 3, 1, 4, 2, 5]
        keep = graph.keep_all()
        keep[[1, 2]] = False
        assert shuffle(keep).tolist() == [0, 1, 2, 3]  # channels 0, 3, 4 and 5 of before
    else:
        assert units(graph, "a.weight") == [0, 1, 2, 0, 1, 2]
        assert units(graph, "z.weight", 1) == [0, 0, 1, 1, 2, 2]
    for sizes in [(2, 3, 8, 8), (-1, 3, 8, 8)]:  # the second does not raise with fewer channels, and is wrong
        written = between(lambda net, y, sizes=sizes: y.view(2, *sizes).transpose(1, 2).flatten(1, 2), 6, 6, form)
        if form == "graph":
            assert units(written, "a.weight") == [0, 1, 2, 0, 1, 2]
        else:
            assert frozen(written) == {"a": [(6, f"view in Net {FOLLOWS_NOT}")]}


def test_reshape_that_lays_two_kinds_of_channels_on_one_axis():
    def outer(net: Net, y: Tensor) -> Tensor:
        rows, columns = y.mean((2, 3)), net.b(y).mean((2, 3))
        return (rows[:, :, None] * columns[:, None, :]).reshape(2, 12, 1, 1)

    graph = between(outer, 4, 12, "graph", b=conv(4, 3))
    reason = "reshape in Net lays several kinds of channels on one axis"
    assert frozen(graph) == {"a": [(4, reason)], "b": [(3, reason)]}


@pytest.mark.parametrize("form", WHOLE)
def test_expand(form: Form):
    graph = between(lambda net, y: y * net.g(y.mean((2, 3), keepdim=True)).expand_as(y), 4, 4, form, g=conv(4, 4))
    assert groups(graph) == [("a", 4, ("a", "g"), ("g", "z"))]
    written = between(lambda net, y: net.g(y.mean((2, 3), keepdim=True)).expand(2, 4, 8, 8), 4, 4, form, g=conv(4, 4))
    over = between(lambda net, y: y * net.g(y).expand(2, 4, 8, 8), 4, 4, form, g=conv(4, 1))
    if form == "graph":
        assert groups(written) == [("a", 4, ("a",), ("g",)), ("g", 4, ("g",), ("z",))]
        assert groups(over) == [("a", 4, ("a",), ("g", "z"))]
        assert [r.path for r in over.rewrites] == [(1, 1)]
    else:
        reason = f"expand in Net {FOLLOWS_NOT}"
        assert frozen(written) == {"g": [(4, reason)]}
        assert frozen(over) == {"a": [(4, reason)]}


@pytest.mark.parametrize("form", WHOLE)
def test_created(form: Form):
    """A tensor of as many channels as it meets is made anew with fewer."""
    graph = between(lambda net, y: y + torch.ones(1, 1, 8, 8) + torch.zeros(y.shape), 4, 4, form)
    assert groups(graph) == [("a", 4, ("a",), ("z",))]
    wide = between(lambda net, y: y + torch.ones(4, 1, 1), 4, 4, form)
    if form == "graph":
        assert groups(wide) == [("a", 4, ("a",), ("z",))]
        assert [(r.path, r.count(wide.keep_all())) for r in wide.rewrites] == [((0, 0), 4)]
    else:
        assert frozen(wide) == {"a": [(4, f"ones in Net {FOLLOWS_NOT}")]}


@pytest.mark.parametrize("form", WHOLE)
def test_constant(form: Form):
    for value in (torch.arange(4.0), torch.linspace(0, 1, 4)):
        graph = between(lambda net, y, value=value: y + value[:, None, None], 4, 4, form)
        assert frozen(graph) == {"a": [(4, f"add in Net {FIXED}")]}
    made = between(lambda net, y: y + torch.arange(4.0)[:, None, None], 4, 4, form)
    assert frozen(made) == {"a": [(4, f"add in Net {FIXED}")]}
    over_width = between(lambda net, y: y + torch.arange(8.0), 4, 4, form)
    assert groups(over_width) == [("a", 4, ("a",), ("z",))]


def test_nothing():
    """A conversion of types brings an assertion of the exporter into the graph, which reads the tensor."""
    graph = between(lambda net, y: y.double().float(), 4, 4)
    assert groups(graph) == [("a", 4, ("a",), ("z",))]


def test_pick_range():
    """Where all numbers of a line follow by themselves, or count nothing that goes, they are no hindrance."""
    open_ended = between(lambda net, y: y[:, y.shape[1] // 2 :].relu() * y[:, : y.shape[1] // 2], 8, 4)
    assert units(open_ended, "a.weight") == [0, 1, 2, 3] * 2
    number = between(lambda net, y: y[:, 2:], 8, 6, "graph").rewrites
    assert [(r.path, r.count.sign, r.count.offset) for r in number] == [((2,), 1, 0)]
    for form in WHOLE:  # which counts from the front where it can: -0 is the front
        graph = between(lambda net, y: y[:, -3:].relu(), 8, 3, form)
        keep = graph.keep_all()
        keep[0] = False
        counts = [(r.path, r.count(graph.keep_all()), r.count(keep)) for r in graph.rewrites]
        if form == "graph":
            assert (frozen(graph), counts) == ({}, [((2,), 5, 4)])
        else:
            assert (1, "slice in Net counts from the last of them") in frozen(graph)["a"]


@pytest.mark.parametrize("form", WHOLE)
def test_pick_one(form: Form):
    """The channel that is picked by its number stays; in the module form those before it, which move it, may, too."""
    graph = between(lambda net, y: y * y.select(1, 2)[:, None], 6, 6, form)
    this, before = (1, "select in Net picks this channel by its number"), (2, f"select in Net {FOLLOWS_NOT}")
    if form == "graph":
        assert frozen(graph) == {"a": [this]}
        assert units(graph, "a.weight") == [0, 1, -1, 2, 3, 4]
        keep = graph.keep_all()
        keep[0] = False
        assert [(r.path, r.count(keep)) for r in graph.rewrites] == [((2,), 1)]
    else:
        assert set(frozen(graph)["a"]) <= {this, before}
    last = between(lambda net, y: y * y[:, -2][:, None], 6, 6, "graph")
    (number,) = last.rewrites
    keep = last.keep_all()
    keep[-1] = False  # the one after it
    assert (number.count(last.keep_all()) % 6, number.count(keep) % 5) == (4, 4)
    keep[1] = False
    assert number.count(keep) % 4 == 3


@pytest.mark.parametrize("form", WHOLE)
def test_roll(form: Form):
    graph = between(lambda net, y: y.roll(1, 1), 4, 4, form)
    assert frozen(graph) == {"a": [(4, "roll in Net rolls the axis that they lie on")]}
    in_space = between(lambda net, y: y.roll((1, 2), (2, 3)), 4, 4, form)
    assert groups(in_space) == [("a", 4, ("a",), ("z",))]
    everything = between(lambda net, y: y.roll(3), 4, 4, form)
    assert list(frozen(everything)) == ["a"]


@pytest.mark.parametrize("form", WHOLE)
def test_index_select(form: Form):
    computed = between(lambda net, y: y.index_select(1, torch.arange(3)), 4, 3, form)
    assert frozen(computed) == {"a": [(4, "index_select in Net picks channels by computed positions")]}
    in_space = between(lambda net, y: y.index_select(2, torch.arange(3)), 4, 4, form)
    assert groups(in_space) == [("a", 4, ("a",), ("z",))]


@pytest.mark.parametrize("form", WHOLE)
def test_index(form: Form):
    for pick in (lambda y: y[:, [3, 0, 1]], lambda y: y[:, torch.tensor([2, 2, 1])]):
        graph = between(lambda net, y, pick=pick: pick(y), 4, 3, form)
        assert frozen(graph) == {"a": [(4, "index in Net picks channels by computed positions")]}
    in_space = between(lambda net, y: y[:, :, [3, 0, 1]], 4, 4, form)
    assert groups(in_space) == [("a", 4, ("a",), ("z",))]


@pytest.mark.parametrize("form", WHOLE)
def test_embedding(form: Form):
    """Rows are looked up and stay; the channels of a row are a layer's where they meet one's."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.z(net.a(x) + net.table((x[:, 0, 0, 0] > 0).long())[:, :, None, None])

    graph = graph_of(forward, form=form, a=conv(3, 4), table=nn.Embedding(2, 4), z=conv(4, 2))
    assert units(graph, "table.weight", 1) == [0, 1, 2, 3]
    assert ("table.weight", 0) not in graph.units
    assert groups(graph) == [("a", 4, ("a",), ("z",))]


@pytest.mark.parametrize("form", WHOLE)
def test_split(form: Form):
    computed = between(lambda net, y: torch.cat(y.split(y.shape[1] // 2, 1)[::-1], 1), 6, 6, form)
    assert units(computed, "a.weight") == ([0, 1, 2, 0, 1, 2] if form == "module" else [0, 1, 2, 3, 4, 5])
    apart = between(lambda net, y: torch.cat([p[:, None] for p in y.unbind(1)], 1), 6, 6, form)
    assert frozen(apart) == {"a": [(6, "unbind in Net unbinds the axis that they lie on")]}
    in_space = between(lambda net, y: torch.cat(y.split([3, 5], 2)[::-1], 2), 4, 4, form)
    assert groups(in_space) == [("a", 4, ("a",), ("z",))]


@pytest.mark.parametrize("form", WHOLE)
def test_pad(form: Form):
    spatial = between(
        lambda net, y: F.pad(F.pad(y, (1, 0, 2, 1), value=3.0), (1, 1, 1, 1), mode="circular"), 4, 4, form
    )
    assert groups(spatial) == [("a", 4, ("a",), ("z",))]
    graph = between(lambda net, y: net.b(y) + F.pad(y, (0, 0, 0, 0, 1, 2)), 3, 6, form, b=conv(3, 6))
    if form == "graph":
        assert units(graph, "b.weight", 0) == units(graph, "z.weight", 1) == [3, 0, 1, 2, 4, 5]
        assert groups(graph) == [("a", 3, ("a", "b"), ("b", "z")), ("b", 3, ("b",), ("z",))]
        keep = graph.keep_all()
        keep[[0, 3, 5]] = False
        assert sorted((r.path, r.count(keep)) for r in graph.rewrites) == [((1, 4), 0), ((1, 5), 1)]
    else:
        assert units(graph, "b.weight", 0) == units(graph, "z.weight", 1) == [-1, 0, 1, 2, -1, -1]
        assert frozen(graph) == {"b": [(3, f"pad in Net {FOLLOWS_NOT}")]}
    up_to = between(lambda net, y: net.b(y) + F.pad(y, (0, 0, 0, 0, 0, 6 - y.shape[1])), 3, 6, form, b=conv(3, 6))
    if form == "graph":
        assert units(up_to, "b.weight", 0) == [0, 1, 2, 3, 4, 5]
    else:
        assert frozen(up_to) == {name: [(n, f"pad in Net {FOLLOWS_NOT}")] for name, n in [("a", 3), ("b", 6)]}


def test_pad_with_copies_of_channels():
    graph = between(lambda net, y: F.pad(y.movedim(1, 3), (1, 1, 0, 0), mode="reflect").movedim(3, 1), 4, 6)
    assert frozen(graph) == {"a": [(4, "pad in Net pads the axis that they lie on with copies of them")]}


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


# ---------------------------------------------------------------------------------------------------- what has no rule


@pytest.mark.parametrize("form", WHOLE)
def test_unknown_operator_freezes_and_is_named(form: Form):
    graph = between(lambda net, y: torch.cumprod(y, 3), 4, 4, form)
    assert groups(graph) == []
    assert frozen(graph) == {"a": [(4, "no rule for operator cumprod in Net on 2×4×8×8")]}
    in_a_module = trace(
        nn.Sequential(conv(3, 4), Net(lambda net, y: torch.cumprod(y, 3)), conv(4, 2)), torch.zeros(1, 3, 8, 8), form
    )
    assert frozen(in_a_module) == {"0": [(4, "no rule for operator cumprod in 1 on 1×4×8×8")]}


@pytest.mark.filterwarnings("ignore:The tensor attributes self.r._flat_weights")
def test_multiplications_that_are_not_counted_are_named():
    graph = between(lambda net, y: y @ y.transpose(2, 3), 4, 4)
    assert graph.not_counted == {"matmul": 1}
    assert groups(graph) == [("a", 4, ("a",), ("z",))]
    recurrent = graph_of(
        lambda net, x: net.z(net.r(net.a(x).flatten(2).transpose(1, 2))[0]),
        a=conv(3, 4), r=nn.LSTM(4, 5, batch_first=True), z=nn.Linear(5, 2),
    )  # fmt: skip
    assert recurrent.not_counted == {"lstm": 1}
    assert frozen(recurrent) == {"a": [(4, "no rule for operator lstm in r on 2×64×4")]}


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
    name = "aten.cumprod"
    try:

        @rule(name)
        def running_product(t, x, dim, **_):
            t.freeze_axes(x, [dim], f"{t.where} multiplies them")
            return type(x)(t.shape, x.off([dim]))

        assert groups(between(lambda net, y: torch.cumprod(y, 3), 4, 4)) == [("a", 4, ("a",), ("z",))]
        over = between(lambda net, y: torch.cumprod(y, 1), 4, 4)
        assert frozen(over) == {"a": [(4, "cumprod in Net multiplies them")]}
        with pytest.raises(ConvpareError, match=r"aten\.cumprod has a rule already \(running_product\)"):
            rule(name)(running_product)
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


@pytest.mark.parametrize(("kind", "before", "count"), [(Widen, 1, 3), (Widen, 2, 8), (TaughtWiden, 1, 7)])
def test_mends(kind: type[Widen], before: int, count: int):
    """A padding module of the user's own: an attribute of 1 is not found by its value, and must be taught."""
    torch.manual_seed(0)
    net = Net(
        lambda net, x: net.z(F.relu(net.b(net.a(x)) + net.pad(net.a(x)))),
        a=conv(3, 3), b=conv(3, before + 6), z=conv(before + 6, 2), pad=kind(before, 3),
    )  # fmt: skip
    graph = trace(net, torch.zeros(1, 3, 4, 4))
    assert graph.channels == count
    if count == 3:
        assert frozen(graph)["b"][0][0] == 4
    else:
        assert frozen(graph) == {}
        assert [(g.name, g.channels) for g in graph.groups] == [("a", 3), ("b", before + 3)]
        assert units(graph, "b.weight") == [*range(3, 3 + before), 0, 1, 2, *range(3 + before, count)]
    assert len(graph.mends) == (kind is TaughtWiden)
    assert {a.name for a in graph.attributes} == ({"before", "after"} if count == 8 else set())
    keep = graph.keep_all()
    keep[0] = False
    if count > 3:
        keep[[3, count - 1]] = False
    small = removed(net, graph, keep)
    assert (small.pad.before, small.pad.after) == ((before - 1, 2) if count > 3 else (1, 3))
    assert self_check(net, graph, keep).passed


# ---------------------------------------------------------------------------------------------------------- the graph


def test_graph_as_data():
    graph = between(lambda net, y: y.relu(), 4, 4)
    data = json.loads(json.dumps(graph.to_json()))
    assert data["model"] == "Net"
    assert data["inputs"] == [[2, 3, 8, 8]]
    assert data["groups"] == [{"name": "a", "channels": 4, "producers": ["a"], "consumers": ["z"], "inexact": None}]
    assert data["form"] == "module"
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


@pytest.mark.parametrize("channels", [2, 3, 12])
@pytest.mark.parametrize("between", [0, 1, 2, 5])
def test_numbers_of_groups_that_could_lose_alike(channels: int, between: int):
    """A number that counts one group and stands for another of the same size is told, whatever trials remove."""

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        first = net.a(x)
        y = first
        for n in range(between):
            y = torch.relu(getattr(net, f"m{n}")(y))
        return net.z(torch.relu(net.b(y)).flatten(1).reshape(first.shape))

    torch.manual_seed(0)
    middle = {f"m{n}": conv(channels, channels) for n in range(between)}
    model = Net(forward, a=conv(3, channels), **middle, b=conv(channels, channels), z=conv(channels, 2))
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    assert {group.name for group in graph.groups}.isdisjoint({"a", "b"})
    for unit in range(graph.channels):
        keep = graph.keep_all()
        keep[unit] = False
        assert self_check(model, graph, keep).passed


def test_norm_and_direction_of_one_shape():
    """A weight-normalised convolution that reads one channel a group: it is counted, whichever of the two it is."""
    torch.manual_seed(0)
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 12, 1, groups=2))
    model = nn.Sequential(conv(3, 2), weighted, nn.ReLU(), conv(12, 2))
    found = count(model, torch.zeros(1, 3, 8, 8))
    assert not found.not_counted
    assert found.total.macs == 64 * (3 * 2 + 12 + 24)
