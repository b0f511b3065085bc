"""Parts that hand tensors to each other: channels between them go in the linked form, and in no other."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import Witness, random_keep, randomise
from nets import Net, conv
from torch import Tensor, nn

import convpare
from convpare.errors import ConvpareError
from convpare.graph import Graph, removed, self_check, trace, zeroed
from convpare.planning.cost import count, total_cost

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
FREE = ["body.0", "body.2", "head.0"]


def parted(between: Callable[[Any, Tensor], Any], **others: nn.Module) -> nn.Module:
    """A body and a head that can be captured, and something between them that cannot."""

    def forward(net: Any, x: Tensor) -> Any:
        if x.sum() > 1e9:
            raise AssertionError("too bright")
        return between(net, x)

    torch.manual_seed(0)
    body = nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 6))
    head = nn.Sequential(conv(6, 5), nn.ReLU(), conv(5, 2))
    return randomise(Net(forward, head=head, body=body, **others)).double().eval()


def linked(model: nn.Module) -> Graph:
    return trace(model, IMAGE.double(), form="linked")


def names(graph: Graph) -> list[str]:
    return [group.name for group in graph.groups]


def assert_whole_is_exact(model: nn.Module, graph: Graph) -> None:
    """Of the parts, of the whole model on real images, and in cost."""
    for seed in range(3):
        keep = random_keep(graph, seed)
        assert not keep.all()
        assert self_check(model, graph, keep).passed
        small = removed(model, graph, keep)
        dense = zeroed(model, graph, keep)
        for x in (IMAGE.double(), 3 * IMAGE.double() + 1):
            for a, b in zip(flat(dense(x)), flat(small(x)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert count(small, IMAGE.double()).total == total_cost(graph, keep)


def flat(result: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(result))


def test_what_one_part_hands_to_another():
    model = parted(lambda net, x: net.head(net.body(x)))
    witness = Witness(model)
    graph = linked(model)
    witness.assert_untouched()
    assert [(part.name, dict(part.links), set(part.inner)) for part in graph.parts] == [
        ("body", {}, {0}),  # in the order of their calls, not of their definition
        ("head", {0: (0, 0)}, set()),
    ]
    assert names(graph) == FREE
    assert graph.group("body.2").consumers == ("head.0",)
    assert graph.form == "linked"
    assert_whole_is_exact(model, graph)


def test_by_default_they_stay():
    graph = trace(parted(lambda net, x: net.head(net.body(x))), IMAGE.double())
    assert names(graph) == ["body.0", "head.0"]
    assert all(not part.links and not part.inner for part in graph.parts)


def test_shapes_may_be_read():
    """As anchors do, which know the size of a feature map, its type and its device."""

    def between(net: Any, x: Tensor) -> Any:
        y = net.body(x)
        grid = torch.ones(y.shape[-2:], dtype=y.dtype, device=y.device) * y.size(0) * y.dim()
        return net.head(y), grid

    model = parted(between)
    graph = linked(model)
    assert names(graph) == FREE
    assert_whole_is_exact(model, graph)


@pytest.mark.parametrize(
    "between",
    [
        lambda net, x: (net.head(y := net.body(x)), y),
        lambda net, x: (net.head(y := net.body(x)), y.mean()),
        lambda net, x: net.head(net.body(x).mul_(2)),
        lambda net, x: net.head(net.body(x) + 1),
        lambda net, x: (y := net.body(x), net.head(y)["deep"] if isinstance(y, dict) else net.head(y) * y.amax())[1],
        lambda net, x: (net.head(y := net.body(x)), torch.zeros(y.shape[1])),
        lambda net, x: net.head(y := net.body(x)) * y.shape[1],
        lambda net, x: net.head(net.body(x)) if net.body(x).numel() > 400 else 0,
    ],
    ids=["returned", "mean", "in-place", "sum", "maximum", "as-many", "times-channels", "numel"],
)
def test_what_is_used_in_another_way_stays(between: Callable[[Any, Tensor], Any]):
    graph = linked(parted(between))
    assert names(graph) == ["body.0", "head.0"]
    (why,) = [f.reason for f in graph.frozen if f.layer == "body.2"]
    assert why.startswith(("the output of body, beyond", "conv2d takes a number", "a line that counts nothing itself"))


def test_leaves_of_a_dictionary_are_told_apart():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = conv(3, 6), conv(3, 4)

        def forward(self, x: Tensor) -> OrderedDict[str, Tensor | None]:
            return OrderedDict(fine=self.fine(x), none=None, coarse=self.coarse(x))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(6, 2), conv(4, 2)

        def forward(self, maps: list[Tensor], *, scale: float) -> Tensor:
            return self.a(maps[0]) * scale + self.b(maps[1])

    def forward(net: Any, x: Tensor) -> Tensor:
        maps = net.body(x)
        out = net.head([maps["fine"], maps["coarse"]], scale=2.0)
        return out if x.sum() > 0 else out - maps["coarse"].mean()

    torch.manual_seed(0)
    model = Net(forward, body=Body(), head=Head()).double().eval()
    dark = -IMAGE.abs().double()
    graph = trace(model, dark, form="linked")
    assert names(graph) == ["body.fine"]  # the coarse one is read by the mean
    keep = random_keep(graph, 0)
    assert self_check(model, graph, keep).passed
    torch.testing.assert_close(removed(model, graph, keep)(dark), zeroed(model, graph, keep)(dark))


def test_a_head_over_several_maps():
    """One part called several times, each time with another part's output."""

    def between(net: Any, x: Tensor) -> list[Tensor]:
        first = net.body(x)
        return [net.head(first), net.head(net.down(first))]

    model = parted(between, down=nn.Sequential(nn.MaxPool2d(2), conv(6, 6)).double())
    graph = linked(model)
    assert [part.name for part in graph.parts] == ["body", "head", "down", "head"]
    assert names(graph) == [*FREE[:2], "head.0"]  # the maps are read by the same head
    assert set(graph.group("body.2").producers) == {"body.2", "down.1"}
    assert_whole_is_exact(model, graph)


def test_numbers_in_a_later_part():
    """Nodes of several parts have the same names; the numbers of one are not those of another."""

    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            return self.conv(x.reshape(n, c, h * w).reshape(n, c, h, w))

    model = parted(lambda net, x: net.tail(net.body(x)), tail=Shuffle())
    model.body.append(Shuffle().double())
    model.body[-1].conv = conv(6, 6).double()
    graph = linked(model)
    assert names(graph) == ["body.0", "body.2", "body.3.conv"]
    assert_whole_is_exact(model, graph)


def test_a_head_that_finds_nothing_is_proven_all_the_same():
    """A part that the example gives an empty batch is compared on one element."""

    def between(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.body(x)
        return y, net.head(y[y.mean((1, 2, 3)) > 1e9])

    model = parted(between)
    graph = trace(model, IMAGE.double())
    assert [tuple(part.args[0].shape) for part in graph.parts] == [(2, 3, 8, 8), (0, 6, 6, 6)]
    assert names(graph) == ["body.0", "head.0"]
    keep = random_keep(graph, 0)
    check = self_check(model, graph, keep)
    assert check.passed, check
    torch.nn.utils.parametrize.register_parametrization(model.head[2], "weight", Uneven())
    assert not self_check(model, graph, keep).passed


class Uneven(nn.Module):
    """A weight that is another one when it is narrow."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight if weight.shape[1] == 5 else 2 * weight


def test_draws_between_the_parts_are_the_same_ones():
    def between(net: Any, x: Tensor) -> Tensor:
        y = net.body(x)
        return net.head(y) + torch.rand(1).to(x)

    model = parted(between)
    state = torch.random.get_rng_state()
    assert names(linked(model)) == FREE
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_differs_from_run_to_run_is_not_linked():
    calls: list[int] = []

    def between(net: Any, x: Tensor) -> Tensor:
        calls.append(0)
        return net.head(net.body(x)) * len(calls)

    assert names(linked(parted(between))) == ["body.0", "head.0"]


def test_a_result_of_another_kind_is_not_linked():
    class Found:
        def __init__(self, maps: Tensor) -> None:
            self.maps = maps

    assert names(linked(parted(lambda net, x: (net.head(y := net.body(x)), Found(y))))) == ["body.0", "head.0"]


def test_of_a_whole_model_it_is_the_module_form():
    model = nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 2)).double()
    whole, graph = trace(model, IMAGE.double()), linked(model)
    assert (names(graph), graph.form, graph.parts) == (names(whole), "linked", ())
    keep = random_keep(graph, 0)
    assert np.array_equal(keep, random_keep(whole, 0))
    assert torch.equal(removed(model, graph, keep)(IMAGE.double()), removed(model, whole, keep)(IMAGE.double()))


def test_planned_applied_saved_and_loaded(tmp_path: Path):
    def straight() -> nn.Module:
        return parted(lambda net, x: net.head(net.body(x))).float()

    model, x = straight(), IMAGE
    graph = trace(model, x, form="linked")
    made = convpare.plan(model, x, macs=0.2, criterion="l2", graph=graph)
    assert made.form == "linked"
    assert "linked form" in str(made)
    small = convpare.apply(model, made)
    assert count(small, x).total.macs == made.after.macs <= 0.2 * made.before.macs
    assert small.body[2].weight.shape[0] == small.head[0].weight.shape[1] < 6
    convpare.save(small, tmp_path / "small")
    again = convpare.load(tmp_path / "small", straight)
    assert torch.equal(again(x), small(x))
    with pytest.raises(ConvpareError, match="made for the linked form"):
        convpare.apply(model, made, form="module")


def test_a_budget_out_of_reach_names_the_form():
    model = parted(lambda net, x: net.head(net.body(x)))
    with pytest.raises(ConvpareError, match="--form linked"):
        convpare.plan(model, IMAGE.double(), macs=0.05, criterion="l2")
