"""Numbers that a forward takes from its module's attributes: found, kept true, saved; and what is no attribute."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import FOLLOWS_NOT, assert_exact, frozen, outputs, random_keep, units
from nets import Attention, Net, conv, tokens
from torch import Tensor, nn

from convpare import artifact
from convpare.artifact import load, save
from convpare.errors import ConvpareError
from convpare.graph import Graph, mends, removed, self_check, trace
from convpare.graph.mending import numbers

SHAPE = [(2, 3, 8, 8)]
IMAGE = torch.zeros(2, 3, 8, 8)


class Around(nn.Module):
    """16 channels before `middle`, `after` behind it."""

    def __init__(self, middle: nn.Module, after: int = 16) -> None:
        super().__init__()
        self.first, self.middle, self.last = conv(3, 16, 3, padding=1), middle, conv(after, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(F.relu(self.first(x))))


class Scales(nn.Module):
    """Res2Net: four parts of `width`, each convolved with what came of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.convs = 4, nn.ModuleList(conv(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.width, 1)
        y, made = parts[0], []
        for number, layer in enumerate(self.convs):
            y = F.relu(layer(y if number == 0 else y + parts[number]))
            made.append(y)
        return torch.cat([*made, parts[3]], 1)


class DualPath(nn.Module):
    """DPN: the first `n` channels are added, the others are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.layer = 10, conv(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cat([x[:, : self.n] + y[:, : self.n], x[:, self.n :], y[:, self.n :]], 1)


class Branches(nn.Module):
    """InceptionNeXt: parts of sizes that it keeps in a tuple."""

    def __init__(self, sizes: tuple[int, ...] | list[int] = (6, 3, 3, 4)) -> None:
        super().__init__()
        self.split_indexes = sizes
        self.layers = nn.ModuleList(conv(n, n, 3, padding=1, groups=n) for n in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        first, *others = torch.split(x, self.split_indexes, 1)
        return torch.cat([first, *(layer(y) for layer, y in zip(self.layers, others, strict=True))], 1)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dim, self.kernel = 16, nn.Parameter(torch.randn(16, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=self.dim)


class Viewed(nn.Module):
    """In a view, an expansion and a tensor made new; another attribute of the same value is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.unread, self.share = 16, 16, 0.5

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones(1, self.channels, 1, 1) * self.share
        return x.flatten(2).view(x.shape[0], self.channels, 8, 8) * ones.expand(-1, self.channels, 8, 8)

    def extra_repr(self) -> str:
        return f"unread={self.unread}"


class Tail(nn.Module):
    """The last `n` channels, by a negative bound."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 6

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, -self.n :].sigmoid(), x[:, : -self.n]], 1)


Groups = list[tuple[str, int]]

# name → the module in the middle, channels after it, groups, and of its attribute: name, value, and value after surgery
FOLLOWED: dict[str, tuple[Callable[[], nn.Module], int, Groups, str, object, object]] = {
    "res2net": (Scales, 16, [("first", 4), ("middle.convs.2", 4)], "width", 4, 3),
    "dual path": (DualPath, 22, [("first", 10), ("first#2", 6), ("middle.layer", 6)], "n", 10, 7),
    "inception next": (
        Branches, 16, [("first", 6), ("first#2", 3), ("first#3", 3), ("first#4", 4)], "split_indexes", (6, 3, 3, 4),
        (4, 2, 2, 3),
    ),
    "a list": (
        lambda: Branches([6, 3, 3, 4]), 16, [("first", 6), ("first#2", 3), ("first#3", 3), ("first#4", 4)],
        "split_indexes", [6, 3, 3, 4], [4, 2, 2, 3],
    ),
    "groups": (Depthwise, 16, [("first", 16)], "dim", 16, 11),
    "sizes of views": (Viewed, 16, [("first", 16)], "channels", 16, 11),
    "a negative bound": (Tail, 16, [("first", 15)], "n", 6, None),  # of which the last stays: -0 is the front
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_attribute_is_found_and_kept_true(name: str):
    build, after, groups, attribute, before, left = FOLLOWED[name]
    graph = assert_exact(lambda: Around(build(), after), SHAPE)
    assert [(g.name, g.channels) for g in graph.groups] == groups
    last = {"first": [(1, "slice in middle counts from the last of them")]}
    assert frozen(graph) == (last if name == "a negative bound" else {})
    assert [(a.module, a.name, a(graph.keep_all())) for a in graph.attributes] == [
        ("middle", attribute, before if isinstance(before, int) else tuple(before))
    ]
    torch.manual_seed(0)
    model = Around(build(), after)
    keep = random_keep(graph, 0)
    value = getattr(removed(model, graph, keep).middle, attribute)
    assert getattr(model.middle, attribute) == before
    if left is None:  # 6 channels, of which any but the last may have gone
        start = graph.units["first.weight", 0][-6:]
        left = int(((start < 0) | keep[start]).sum())
    assert (value, type(value)) == (left, type(before))


def test_what_is_cut_twice_is_kept_true_twice():
    torch.manual_seed(0)
    model = Around(DualPath(), 22)
    for n in (7, 5):
        graph = trace(model, IMAGE)
        keep = random_keep(graph, 0)
        assert self_check(model, graph, keep).passed
        model = removed(model, graph, keep)
        assert model.middle.n == n == model.middle.layer.weight.shape[0] - (4 if n == 7 else 3)


def test_an_attribute_of_the_whole_model():
    class Whole(Around):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.hidden = 16

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).reshape(x.shape[0], self.hidden, -1).unflatten(2, (8, 8)))

    graph = assert_exact(Whole, SHAPE, (0,))
    assert [(a.module, a.name, a(random_keep(graph, 0))) for a in graph.attributes] == [("", "hidden", 11)]


def test_two_numbers_from_one_attribute_go_together():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n, self.a, self.b = 8, conv(16, 16), conv(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return torch.cat([a[:, : self.n], b[:, : self.n].sigmoid(), a[:, self.n :] + b[:, self.n :]], 1)

    graph = assert_exact(lambda: Around(Both(), 24), SHAPE)
    assert units(graph, "middle.a.weight") == units(graph, "middle.b.weight") == list(range(16, 32))
    assert units(graph, "last.weight", 1) == [*range(16, 24), *range(16, 24), *range(24, 32)]
    in_graph = trace(Around(Both(), 24), IMAGE, "graph")
    assert units(in_graph, "middle.b.weight")[:8] == list(range(32, 40))  # there each number is set for itself


def test_a_module_that_runs_twice_has_one_number():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.tail, self.last = conv(3, 16), conv(3, 16), Tail(), conv(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.tail(self.a(x))) + self.last(self.tail(self.b(x)).relu())

    graph = assert_exact(Twice, SHAPE)
    assert [(g.name, g.channels, g.producers) for g in graph.groups] == [("a", 15, ("a", "b"))]
    assert [a.name for a in graph.attributes] == ["n"]


@pytest.mark.parametrize("how", ["matmul", "einsum"])
def test_heads(how: str):
    """The number of heads follows; the channels of a head, which stay, are left alone."""
    model = tokens(Attention(12, 3, how), 12)
    graph = trace(model, IMAGE)
    assert [(a.module, a.name) for a in graph.attributes] == [("attention", "num_heads")]
    keep = graph.keep_all()
    keep[[12, 13]] = False
    small = removed(model, graph, keep)
    assert (small.attention.num_heads, small.attention.head_dim, small.attention.scale) == (1, 4, 0.4)


def test_an_attribute_that_is_not_read_is_left_alone():
    model = Around(Viewed())
    graph = trace(model, IMAGE)
    keep = random_keep(graph, 0)
    small = removed(model, graph, keep).middle
    assert (small.channels, small.unread, small.share) == (11, 16, 0.5)


class TaughtTail(Tail):
    """Its own number has two meanings, which a mender keeps apart."""


@mends(TaughtTail, "n")
def _mend_tail(module: nn.Module, keep: np.ndarray) -> None:
    module.n = int(keep[-module.n :].sum())
    module.told = True


def test_a_class_that_was_taught_is_asked():
    model = Around(TaughtTail())
    graph = trace(model, IMAGE)
    assert graph.attributes == ()
    assert [m.module for m in graph.mends] == ["middle"]
    assert [(g.name, g.channels) for g in graph.groups] == [("first", 15)]
    keep = graph.keep_all()
    keep[[0, 11, 14]] = False
    small = removed(model, graph, keep)
    assert (small.middle.n, small.middle.told, model.middle.n) == (4, True, 6)
    assert self_check(model, graph, keep).passed


# ----------------------------------------------------------------------------------- numbers that no attribute explains


class Config:
    n = 6


class Hidden(nn.Module):
    """A number of another object's, of a list's element, of a global."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.config, self.sizes = how, Config(), [6, 10]

    def forward(self, x: Tensor) -> Tensor:
        n = {"config": self.config.n, "element": self.sizes[0], "class": Config.n}[self.how]
        return torch.cat([x[:, n:], x[:, :n].sigmoid()], 1)


@pytest.mark.parametrize("how", ["config", "element", "class"])
def test_a_number_that_is_hidden_freezes(how: str):
    graph = assert_exact(lambda: Around(Hidden(how)), SHAPE, (0,))
    assert frozen(graph) == {"first": [(16, f"slice in middle {FOLLOWS_NOT}")]}
    assert graph.attributes == ()
    assert trace(Around(Hidden(how)), IMAGE, "graph").channels == 16


class Divided(nn.Module):
    """The number is used for something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 6

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, self.n :] / self.n, x[:, : self.n]], 1)


class Resized(nn.Module):
    """Another number of the same value, which counts no channels."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.side = 8, 8

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(torch.cat([x[:, self.n :], x[:, : self.n].relu()], 1), size=(self.side, self.side))


class Computed(nn.Module):
    """A float that is computed from the number of channels."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return (x / c).view(b, c, h * w).view(b, c, h, w)


@pytest.mark.parametrize("kind", [Divided, Resized, Computed])
def test_a_number_that_has_another_meaning_freezes(kind: type[nn.Module]):
    """In the module; in the captured graph it stays as it was."""
    graph = assert_exact(lambda: Around(kind()), SHAPE, (0,))
    assert [f[0] for f in frozen(graph)["first"]] == [16]
    in_graph = assert_exact(lambda: Around(kind()), SHAPE, (0,), "graph")
    assert in_graph.channels == 16


def test_a_float_of_the_width_freezes_in_an_attention():
    """softmax(q · d^-½ · kᵀ) with one head: d shrinks with the queries and keys."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            q, k, v = self.q(x), self.k(x), self.v(x).view(b, n, c)
            return (q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)).softmax(-1) @ v

    graph = assert_exact(lambda: tokens(Single(), 12), SHAPE, (0,))
    assert [(g.name, g.channels) for g in graph.groups] == [("stem", 12)]
    assert [n for n, _ in frozen(graph)["attention.q"]] == [8]
    in_graph = assert_exact(lambda: tokens(Single(), 12), SHAPE, (0,), "graph")
    assert [(g.name, g.channels) for g in in_graph.groups] == [("stem", 12), ("attention.q", 8)]


# numbers whose change shows only when some channels go and not when others do, or that are none of an operator's own
UNSEEN: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "the first two": lambda net, y: torch.cat([y[:, 2:], y[:, :2].sigmoid()], 1),
    "the last two": lambda net, y: torch.cat([y[:, :-2], y[:, -2:].sigmoid()], 1),
    "the first of the flipped": lambda net, y: torch.cat([y.flip(1)[:, :2].sigmoid(), y.flip(1)[:, 2:]], 1),
    "one from the front": lambda net, y: y * y[:, 2][:, None],
    "one from the end": lambda net, y: y * y[:, -3][:, None],
    "a float in a tensor": lambda net, y: y.view(y.shape) * torch.tensor(1 / y.shape[1]),
    "a float alone": lambda net, y: y / y.shape[1],
}


@pytest.mark.parametrize("name", UNSEEN)
def test_every_channel_that_the_module_form_lets_go(name: str):
    torch.manual_seed(0)
    for channels in (5, 6, 8, 12, 16):
        net = Net(lambda net, x: net.z(UNSEEN[name](net, net.a(x))), a=conv(3, channels), z=conv(channels, 2))
        graph = trace(net, IMAGE)
        for unit in range(graph.channels):
            keep = graph.keep_all()
            keep[unit] = False
            assert self_check(net, graph, keep).passed, (channels, unit)


def test_a_depthwise_convolution_of_two_channels():
    net = Net(
        lambda net, x: net.z((y := net.d(net.a(x))).view(y.shape)), a=conv(3, 2), d=conv(2, 2, 3, groups=2),
        z=conv(2, 2),
    )  # fmt: skip
    assert trace(net, IMAGE).channels == trace(net, IMAGE, "graph").channels == 2


def test_tensor_split_at_positions():
    net = Net(lambda net, x: net.z(torch.cat(net.a(x).tensor_split((2, 5), 1), 1)), a=conv(3, 8), z=conv(8, 2))
    assert trace(net, IMAGE).channels in (0, 8)


def test_an_attribute_that_is_a_bound_and_a_position():
    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = 3

        def forward(self, x: Tensor) -> Tensor:
            return x[:, : self.n].relu() * x[:, -self.n][:, None]

    model = Around(Position(), 3)
    graph = trace(model, IMAGE)
    assert self_check(model, graph, random_keep(graph, 0)).passed
    assert "n" not in {a.name for a in graph.attributes}


class OwnConv(nn.Conv2d):
    """A layer of PyTorch's, with an attribute of its own."""

    def __init__(self) -> None:
        super().__init__(16, 16, 1)
        self.part = 5

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y[:, self.part :].sigmoid(), y[:, : self.part]], 1)


def test_an_attribute_of_a_layer_of_ones_own():
    graph = assert_exact(lambda: Around(OwnConv()), SHAPE)
    assert [a.name for a in graph.attributes] in ([], ["part"])


class Shaped(nn.Module):
    """A shape in a tuple, open in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = (-1, 16, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).view(self.shape)


def test_a_shape_that_is_open():
    graph = assert_exact(lambda: Around(Shaped()), SHAPE)
    keep = random_keep(graph, 0)
    assert [(a.name, a(keep)) for a in graph.attributes] == [("shape", (-1, 11, 8, 8))]


def test_layers_of_pytorch_with_sizes():
    """nn.Unflatten keeps a tuple."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.apart = nn.Unflatten(1, (2, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.apart(x).transpose(1, 2).flatten(1, 2)

    graph = assert_exact(lambda: Around(Parts()), SHAPE, (0,))
    assert [(g.name, g.channels) for g in graph.groups] == [("first", 8)]
    keep = random_keep(graph, 0)
    assert [(a.module, a.name, a(keep)) for a in graph.attributes] == [("middle.apart", "unflattened_size", (2, 6))]


# --------------------------------------------------------------------------------------------------------- artifacts


def cut(model: nn.Module) -> tuple[nn.Module, Graph]:
    torch.manual_seed(1)
    graph = trace(model, IMAGE)
    return removed(model, graph, random_keep(graph, 0)).eval(), graph


@pytest.mark.parametrize("name", FOLLOWED)
def test_artifact_brings_attributes_back(name: str, tmp_path: Path):
    build, after, _, attribute, _, _ = FOLLOWED[name]
    torch.manual_seed(0)
    small, _ = cut(Around(build(), after))
    folder = save(small, tmp_path / "net")
    again = load(folder, lambda: Around(build(), after))
    value = getattr(small.middle, attribute)
    assert getattr(again.middle, attribute) == value
    assert type(getattr(again.middle, attribute)) is type(value)
    assert numbers(again.middle)[attribute] == (value if isinstance(value, int) else list(value))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(outputs(small, [x])[0], outputs(again, [x])[0])
    assert torch.equal(outputs(load(save(again, tmp_path / "twice"), lambda: Around(build(), after)), [x])[0],
                       outputs(small, [x])[0])  # fmt: skip


def test_artifact_brings_a_shape_that_is_open_back(tmp_path: Path):
    small, _ = cut(Around(Shaped()))
    assert load(save(small, tmp_path / "net"), lambda: Around(Shaped())).middle.shape == (-1, 11, 8, 8)


@pytest.mark.parametrize(
    ("name", "attribute", "value", "says"),
    [
        ("dual path", "n", 11, "no larger"),
        ("dual path", "n", -1, "no larger"),
        ("dual path", "n", True, "no larger"),
        ("dual path", "n", "7", "no larger"),
        ("dual path", "n", [7], "no larger"),
        ("inception next", "split_indexes", [4, 2, 2, 5], "no larger"),
        ("inception next", "split_indexes", [4, 2, 2], "no larger"),
        ("inception next", "split_indexes", [4, 2, 2, -3], "no larger"),
        ("inception next", "split_indexes", 5, "no larger"),
        ("sizes of views", "share", 0, "'share' is no number of Viewed that may be set"),
        ("sizes of views", "training", 0, "'training' is no number of Viewed that may be set"),
        ("sizes of views", "forward", 0, "'forward' is no number of Viewed that may be set"),
        ("sizes of views", "__class__", 0, "'__class__' is no number of Viewed that may be set"),
        ("sizes of views", "_parameters", 0, "'_parameters' is no number of Viewed that may be set"),
        ("sizes of views", "unheard_of", 1, "'unheard_of' is no number of Viewed that may be set"),
    ],
)
def test_artifact_that_was_forged_is_refused(name: str, attribute: str, value: object, says: str, tmp_path: Path):
    build, after, *_ = FOLLOWED[name]
    small, _ = cut(Around(build(), after))
    folder = save(small, tmp_path / "net")
    record = json.loads((folder / "plan.json").read_text())
    assert "middle" in record["numbers"]
    record["numbers"]["middle"][attribute] = value
    record["checksum"] = artifact._checksum(record)
    (folder / "plan.json").write_text(json.dumps(record))
    model = Around(build(), after)
    before = dict(vars(model.middle))
    with pytest.raises(ConvpareError, match=says):
        load(folder, lambda: model)
    assert {k: v for k, v in vars(model.middle).items() if isinstance(v, int | float | tuple | list)} == {
        k: v for k, v in before.items() if isinstance(v, int | float | tuple | list)
    }


class Table(nn.Module):
    """A table (positions, width) that is laid over the maps: with one channel left it is contiguous as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.layer, self.last = 12, conv(3, 12), conv(12, 5)
        self.table = nn.Parameter(torch.randn(64, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x) + self.table.permute(1, 0).contiguous().view(1, self.width, 8, 8))


def test_a_copy_that_the_capture_leaves_out():
    graph = assert_exact(Table, SHAPE, range(2))
    assert [(g.name, g.channels) for g in graph.groups] == [("layer", 12)]


def test_a_shape_of_other_channels():
    """A view of features that stay, in the shape of channels that would go; it spells no number of channels itself."""

    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 12, 3, padding=1), nn.Linear(144, 144)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y.flatten(1)).view(y.shape).mean(1)

    bound = trace(Reshaped(), torch.zeros(2, 1, 12))
    assert bound.groups == ()
    assert frozen(bound)["a"] == [(12, f"view in Reshaped {FOLLOWS_NOT}")]
    free = trace(Reshaped(), torch.zeros(2, 1, 12), form="graph")
    assert ("a", 12) in [(g.name, g.channels) for g in free.groups]
