"""Products of activations, hand-computed: what is summed over is coupled, heads go as a whole."""

import pytest
import torch
import torch.nn.functional as F
from checks import FOLLOWS_NOT, WHOLE, assert_exact, between, frozen, graph_of, groups, marked, random_keep, units
from nets import Attention, BiasedAttention, Net, SharedKeys, conv, tokens, torch_attention
from torch import Tensor, nn

from convpare.graph import Graph, removed, self_check, trace
from convpare.graph.structure import Form

forms = pytest.mark.parametrize("form", WHOLE)
IMAGE = torch.zeros(2, 3, 8, 8)
SHAPE = [(2, 3, 8, 8)]


def flat(y: Tensor) -> Tensor:
    return y.flatten(2)


# ------------------------------------------------------------------------------------------------------------ products


@forms
def test_matmul(form: Form):
    """Over channels: both factors lose them; the result has none."""
    graph = graph_of(
        lambda net, x: net.z((flat(net.a(x)).transpose(1, 2) @ flat(net.b(x))).mean(1)),
        form=form, a=conv(3, 4), b=conv(3, 4), z=nn.Linear(64, 2),
    )  # fmt: skip
    assert units(graph, "a.weight") == units(graph, "b.weight") == [0, 1, 2, 3]
    assert (groups(graph), marked(graph)) == ([("a", 4, ("a", "b"), ())], {})
    assert graph.not_counted == {"matmul": 1}


@forms
def test_matmul_keeps_the_axes_that_are_not_summed(form: Form):
    graph = graph_of(
        lambda net, x: net.z((flat(net.a(x)) @ flat(net.b(x)).transpose(1, 2)).amax(2)),
        form=form, a=conv(3, 4), b=conv(3, 5), z=nn.Linear(4, 2),
    )  # fmt: skip
    assert units(graph, "a.weight") == units(graph, "z.weight", 1) == [0, 1, 2, 3]
    assert frozen(graph) == {"b": [(5, "amax in Net reduces over them")]}


@forms
def test_matmul_with_a_parameter(form: Form):
    """No layer makes the channels after it, so they stay."""
    graph = graph_of(
        lambda net, x: net.z((net.a(x).mean((2, 3)) @ net.w).relu()),
        form=form, a=conv(3, 4), w=torch.zeros(4, 5), z=nn.Linear(5, 2),
    )  # fmt: skip
    assert units(graph, "w") == units(graph, "a.weight") == [0, 1, 2, 3]
    assert [g.channels for g in graph.groups] == [4]
    vector = graph_of(
        lambda net, x: net.z(torch.mv(net.a(x).mean((2, 3)), net.w)[:, None]),
        form=form, a=conv(3, 4), w=torch.zeros(4), z=nn.Linear(1, 2),
    )  # fmt: skip
    assert units(vector, "w") == units(vector, "a.weight") == [0, 1, 2, 3]


@forms
def test_matmul_in_batches(form: Form):
    graph = graph_of(
        lambda net, x: net.z(torch.bmm(flat(net.a(x)), flat(net.b(x)).transpose(1, 2)).flatten(1)),
        form=form, a=conv(3, 2), b=conv(3, 3), z=nn.Linear(6, 2),
    )  # fmt: skip
    # two kinds on one axis of z cannot go one by one
    assert len({*units(graph, "a.weight"), *units(graph, "b.weight")}) == 1


@forms
def test_matmul_of_what_is_not_zero(form: Form):
    """A removed channel still adds 0.5 · 0.5 to the sum if it is only zeroed."""
    graph = graph_of(
        lambda net, x: net.z((flat(net.a(x)).sigmoid().transpose(1, 2) @ flat(net.b(x)).sigmoid()).mean(1)),
        form=form, a=conv(3, 4), b=conv(3, 4), z=nn.Linear(64, 2),
    )  # fmt: skip
    assert marked(graph) == {"a": "matmul in Net sums over them"}


@forms
def test_matmul_with_what_has_no_channels(form: Form):
    graph = graph_of(
        lambda net, x: net.z((flat(net.a(x)).transpose(1, 2) @ flat(x)).mean(1)),
        form=form, a=conv(3, 3), z=nn.Linear(64, 2),
    )  # fmt: skip
    assert frozen(graph) == {"a": [(3, "matmul in Net multiplies them with a tensor of fixed size")]}


@forms
def test_addmm(form: Form):
    graph = graph_of(
        lambda net, x: net.z(torch.addmm(net.b(x).mean((2, 3)), net.a(x).mean((2, 3)), net.w).relu()),
        form=form, a=conv(3, 4), b=conv(3, 5), w=torch.zeros(4, 5), z=nn.Linear(5, 2),
    )  # fmt: skip
    assert units(graph, "b.weight") == units(graph, "w", 1) == units(graph, "z.weight", 1) == [0, 1, 2, 3, 4]
    assert units(graph, "a.weight") == units(graph, "w", 0) == [5, 6, 7, 8]
    batched = graph_of(
        lambda net, x: net.z(torch.baddbmm(net.s, flat(net.a(x)), flat(net.b(x)).transpose(1, 2)).sum(2)),
        form=form, a=conv(3, 4), b=conv(3, 5), s=torch.zeros(1, 4, 5), z=nn.Linear(4, 2),
    )  # fmt: skip
    assert units(batched, "s", 1) == units(batched, "z.weight", 1) == [0, 1, 2, 3]
    assert units(batched, "s", 2) == units(batched, "b.weight") == [4, 5, 6, 7, 8]
    assert marked(batched) == {}


@forms
def test_einsum(form: Form):
    gate = between(
        lambda net, y: torch.einsum("bchw,bc->bchw", y, net.g(y.mean((2, 3)))), 4, 4, form, g=nn.Linear(4, 4)
    )
    assert groups(gate) == [("a", 4, ("a", "g"), ("g", "z"))]
    project = between(lambda net, y: torch.einsum("bchw,oc->bohw", y, net.w), 4, 5, form, w=torch.zeros(5, 4))
    assert units(project, "a.weight") == units(project, "w", 1) == [0, 1, 2, 3]
    assert ("w", 0) not in project.units
    spaced = between(
        lambda net, y: torch.einsum(" b c h w , c -> b h w ", y, net.w)[:, None], 4, 1, form, w=torch.zeros(4)
    )
    assert (groups(spaced), marked(spaced)) == ([("a", 4, ("a",), ())], {})


@forms
@pytest.mark.parametrize("equation", ["bc...,oc->bo...", "bchw,oc", "bccw,c->bw"])
def test_einsum_that_is_not_followed(equation: str, form: Form):
    def product(net: Net, y: Tensor) -> Tensor:
        if equation == "bccw,c->bw":
            return torch.einsum(equation, y.unfold(2, 4, 4)[:, :, 0].movedim(3, 2), net.w[0])[:, None, None]
        return torch.einsum(equation, y, net.w).reshape(2, 1, 8, -1)

    graph = between(product, 4, 1, form, w=torch.zeros(5, 4))
    (reason,) = {reason for _, reason in frozen(graph)["a"]}
    assert reason == f"einsum in Net: {equation!r} is not followed"


# ----------------------------------------------------------------------------------------------------------- attention


def of(attention: nn.Module, channels: int, form: Form) -> Graph:
    torch.manual_seed(0)
    return trace(tokens(attention, channels), IMAGE, form)


@forms
@pytest.mark.parametrize("how", ["matmul", "fused", "einsum", "scaled by the width"])
def test_attention(how: str, form: Form):
    """12 channels in 3 heads: a head goes with its queries, keys and values, and with what the projection reads."""
    graph = of(Attention(12, 3, how), 12, form)
    heads = [n for n in (12, 13, 14) for _ in range(4)]
    assert units(graph, "attention.qkv.weight") == units(graph, "attention.qkv.bias") == heads * 3
    assert units(graph, "attention.proj.weight", 1) == heads
    assert units(graph, "stem.weight") == units(graph, "attention.qkv.weight", 1) == list(range(12))
    assert units(graph, "attention.proj.weight") == units(graph, "head.weight", 1) == list(range(12))
    assert (frozen(graph), marked(graph)) == ({}, {})
    stream, inner = graph.groups
    assert (stream.name, stream.channels, stream.producers) == ("stem", 12, ("stem", "attention.proj"))
    assert (inner.name, inner.channels, inner.consumers) == ("attention.qkv", 3, ("attention.proj",))


@pytest.mark.parametrize("how", ["matmul", "fused", "einsum"])
def test_attention_keeps_the_number_of_heads_true(how: str):
    torch.manual_seed(0)
    model = tokens(Attention(12, 3, how), 12)
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[[0, 13]] = False  # a channel of the stream, and the second head
    small = removed(model, graph, keep).attention
    assert (small.num_heads, small.head_dim) == (2, 4)
    assert (tuple(small.qkv.weight.shape), tuple(small.proj.weight.shape)) == ((24, 11), (11, 8))
    assert (model.attention.num_heads, model.attention.head_dim) == (3, 4)
    assert self_check(model, graph, keep).passed


@forms
@pytest.mark.parametrize("how", ["matmul", "fused", "einsum"])
def test_attention_is_exact(how: str, form: Form):
    assert_exact(lambda: tokens(Attention(12, 3, how), 12), SHAPE, (0,), form)


def single(net: Net, y: Tensor) -> Tensor:
    """One head, without an axis for it."""
    t = flat(y).transpose(1, 2)
    if net.scale is None or net.fused:
        return F.scaled_dot_product_attention(net.q(t), net.k(t), net.v(t), scale=net.scale).transpose(1, 2)[..., None]
    return ((net.q(t) @ net.k(t).transpose(1, 2) * net.scale).softmax(-1) @ net.v(t)).transpose(1, 2)[..., None]


@forms
@pytest.mark.parametrize("fused", [True, False])
def test_attention_of_one_head(fused: bool, form: Form):
    """Queries and keys go channel by channel, so do values; a scale that is taken from their number is inexact."""

    def graph(scale: float | None) -> Graph:
        net = Net(
            lambda net, x: net.z(single(net, net.a(x))),
            a=conv(3, 4), q=nn.Linear(4, 6), k=nn.Linear(4, 6), v=nn.Linear(4, 5), z=conv(5, 2),
        )  # fmt: skip
        net.scale, net.fused = scale, fused
        return trace(net, IMAGE, form)

    exact = graph(0.5)
    assert [(g.name, g.channels) for g in exact.groups] == [("a", 4), ("q", 6), ("v", 5)]
    assert units(exact, "q.weight") == units(exact, "k.weight") == units(exact, "k.bias") == [4, 5, 6, 7, 8, 9]
    assert units(exact, "v.weight") == units(exact, "z.weight", 1) == [10, 11, 12, 13, 14]
    assert (frozen(exact), marked(exact)) == ({}, {})
    if fused:
        assert marked(graph(None)) == {"q": "scaled_dot_product_attention in Net scales by their number"}


@forms
def test_attention_with_shared_keys(form: Form):
    """Two heads of keys and values serve four of queries: such a pair goes with both its heads."""
    graph = of(SharedKeys(12, 4, 2), 12, form)
    heads = [12] * 6 + [13] * 6
    assert units(graph, "attention.q.weight") == units(graph, "attention.proj.weight", 1) == heads
    assert units(graph, "attention.k.weight") == units(graph, "attention.v.bias") == [12] * 3 + [13] * 3
    assert frozen(graph) == {}
    if form == "module":
        keep = graph.keep_all()
        keep[13] = False
        assert {a.name: a(keep) for a in graph.attributes} == {"heads": 2, "shared": 1}
    assert_exact(lambda: tokens(SharedKeys(12, 4, 2), 12), SHAPE, (0,), form)


@forms
def test_attention_with_shared_keys_by_the_operator(form: Form):
    graph = of(SharedKeys(12, 4, 2, "enable_gqa"), 12, form)
    reason = "scaled_dot_product_attention in attention shares keys among heads"
    assert frozen(graph) == {f"attention.{name}": [(size, reason)] for name, size in [("q", 12), ("k", 6), ("v", 6)]}
    assert [(g.name, g.channels) for g in graph.groups] == [("stem", 12)]


@forms
def test_attention_with_a_bias_by_position(form: Form):
    """The table has a column for each head; its rows are looked up, and stay."""
    graph = of(BiasedAttention(12, 3, 16), 12, form)
    heads = [n for n in (12, 13, 14) for _ in range(4)]
    assert units(graph, "attention.qkv.weight") == heads * 3
    assert units(graph, "attention.table", 1) == [12, 13, 14]
    assert ("attention.table", 0) not in graph.units
    assert frozen(graph) == {}
    assert_exact(lambda: tokens(BiasedAttention(12, 3, 16), 12), SHAPE, (0,), form)


@forms
def test_attention_by_cosine(form: Form):
    """Channels of length one, then a product: exact without a scale, also channel by channel."""

    def forward(net: Net, x: Tensor) -> Tensor:
        t = flat(net.a(x)).transpose(1, 2)
        weights = (F.normalize(net.q(t), dim=-1) @ F.normalize(net.k(t), dim=-1).transpose(1, 2) / 0.1).softmax(-1)
        return net.z((weights @ net.v(t)).mean(1))

    def build() -> nn.Module:
        parts = {"q": nn.Linear(4, 6), "k": nn.Linear(4, 6), "v": nn.Linear(4, 5), "z": nn.Linear(5, 2)}
        return Net(forward, a=conv(3, 4), **parts)

    graph = assert_exact(build, SHAPE, (0,), form)
    assert [(g.name, g.channels, g.inexact) for g in graph.groups] == [("a", 4, None), ("q", 6, None), ("v", 5, None)]
    assert units(graph, "q.weight") == units(graph, "k.weight")
    several = assert_exact(lambda: tokens(Attention(12, 3, "cosine"), 12), SHAPE, (0,), form)
    assert frozen(several) == {}


@forms
def test_attention_by_cosine_with_heads(form: Form):
    graph = of(Attention(12, 3, "cosine"), 12, form)
    assert units(graph, "attention.proj.weight", 1) == [n for n in (12, 13, 14) for _ in range(4)]


class Rotated(Attention):
    """Rotary positions: the halves of a head's channels are turned into each other."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        angles = torch.arange(16)[:, None] * torch.tensor([0.3, 1.0, 0.3, 1.0])
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (x * self.turns[0] + self.turned(x) * self.turns[1] for x in (q, k))
        return (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)


@forms
@pytest.mark.xfail(reason="`cat` along the channels of a head ties them over all heads", strict=True)
def test_attention_with_rotary_positions(form: Form):
    graph = assert_exact(lambda: tokens(Rotated(12, 3), 12), SHAPE, (0,), form)
    assert units(graph, "attention.proj.weight", 1) == [n for n in (12, 13, 14) for _ in range(4)]


@forms
def test_attention_of_channels(form: Form):
    """Channels attend to channels: the softmax runs over them."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = flat(net.a(x))
        return net.z(((y @ y.transpose(1, 2)).softmax(-1) @ y)[..., None])

    graph = graph_of(forward, form=form, a=conv(3, 4), z=conv(4, 2))
    assert (groups(graph), marked(graph)) == ([("a", 4, ("a",), ("z",))], {"a": "softmax in Net normalises over them"})


@forms
def test_attention_of_channels_by_the_operator(form: Form):
    def forward(net: Net, x: Tensor) -> Tensor:
        y = flat(net.a(x))
        return net.z(F.scaled_dot_product_attention(y, y, y)[..., None])

    graph = graph_of(forward, form=form, a=conv(3, 4), z=conv(4, 2))
    assert list(marked(graph)) == ["a"]


@forms
def test_attention_by_a_number_of_the_width(form: Form):
    """`C // num_heads` is not what is left of a head once another is gone."""

    class Divides(Attention):
        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, c))

    graph = of(Divides(12, 3), 12, form)
    if form == "graph":
        assert [g.channels for g in graph.groups] == [12, 3]
    else:
        reason = f"reshape in attention {FOLLOWS_NOT}"
        assert frozen(graph)["attention.qkv"] == [(36, reason)]
        assert graph.groups == ()


@forms
def test_attention_of_pytorch(form: Form):
    """nn.MultiheadAttention checks `embed_dim`, so that its heads' channels are those of the stream, one for one."""
    graph = trace(torch_attention(), IMAGE, form)
    if form == "graph":
        assert [(g.name, g.channels) for g in graph.groups] == [("first", 8), ("mix.in_proj_weight", 2)]
        assert units(graph, "mix.in_proj_weight") == ([8] * 4 + [9] * 4) * 3
        assert units(graph, "mix.in_proj_weight", 1) == units(graph, "mix.out_proj.weight") == list(range(8))
    else:
        halves = [0] * 4 + [1] * 4
        assert [(g.name, g.channels) for g in graph.groups] == [("first", 2)]
        assert units(graph, "mix.in_proj_weight") == halves * 3
        assert units(graph, "first.weight") == units(graph, "mix.out_proj.weight", 1) == halves
        keep = graph.keep_all()
        keep[0] = False
        small = removed(torch_attention(), graph, keep).mix
        assert (small.num_heads, small.embed_dim, small.head_dim) == (1, 4, 4)
        assert tuple(small.in_proj_weight.shape) == (12, 4)


# ----------------------------------------------------------------------------------------------------- unfolded images


@forms
def test_im2col(form: Form):
    """(B, C · 4, positions): the four taps of a channel lie beside each other."""
    graph = graph_of(
        lambda net, x: net.z(F.unfold(net.a(x), 2, stride=2).transpose(1, 2)),
        form=form, a=conv(3, 3), z=nn.Linear(12, 2),
    )  # fmt: skip
    assert units(graph, "a.weight") == [0, 1, 2]
    assert units(graph, "z.weight", 1) == [n for n in range(3) for _ in range(4)]
    over_width = graph_of(
        lambda net, x: net.z(F.unfold(net.m(x), 2, stride=2).transpose(1, 2)),
        form=form, m=nn.Linear(8, 6), z=nn.Linear(12, 2),
    )  # fmt: skip
    assert frozen(over_width) == {"m": [(6, "im2col in Net unfolds the axis that they lie on")]}


@forms
def test_col2im(form: Form):
    graph = graph_of(
        lambda net, x: net.z(F.fold(net.a(x).flatten(2), (16, 16), 2, stride=2)), form=form, a=conv(3, 12), z=conv(3, 2)
    )
    assert units(graph, "a.weight") == [n for n in range(3) for _ in range(4)]
    assert units(graph, "z.weight", 1) == [0, 1, 2]
    back = between(lambda net, y: F.fold(F.unfold(y, 3, padding=1), (8, 8), 3, padding=1), 4, 4, form)
    assert groups(back) == [("a", 4, ("a",), ("z",))]


@forms
def test_products_are_exact(form: Form):
    def forward(net: Net, x: Tensor) -> Tensor:
        a, b = flat(net.a(x)), flat(net.b(x))
        rows = torch.baddbmm(net.s, a, b.transpose(1, 2)).sum(2)
        return net.z(torch.addmm(net.c, rows, net.w)) + (a.transpose(1, 2) @ net.d(x).flatten(2)).mean((1, 2))[:, None]

    torch.manual_seed(0)
    parts = {"s": torch.randn(1, 4, 5), "c": torch.randn(6), "w": torch.randn(4, 6)}
    model = Net(forward, a=conv(3, 4), b=conv(3, 5), d=conv(3, 4), z=nn.Linear(6, 2), **parts)
    graph = trace(model, IMAGE, form)
    assert [(g.name, g.channels, g.inexact) for g in graph.groups] == [("a", 4, None), ("b", 5, None)]
    assert self_check(model, graph, random_keep(graph, 0)).passed
