"""Feature maps are read where the channels of a group are, whatever layout they have there."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import Graph, trace
from convpare.redundancy.taps import Tap, module_of, run, suited, taps_of, visit


class Everything(nn.Module):
    """A stem read by a depthwise layer and a squeeze-excitation gate, a linear layer over positions, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.depth, self.point = nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 6, 1)
        self.tokens, self.mix = nn.Linear(6, 5), nn.Linear(5, 6)
        self.last, self.head = nn.Conv2d(6, 2, 2), nn.Linear(2 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.stem(x)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.point(F.relu(self.depth(y))))
        y = y + self.mix(F.relu(self.tokens(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.head(F.relu(self.last(y)).flatten(1))


SHAPE = (2, 3, 6, 6)


def example() -> tuple[Everything, Graph]:
    torch.manual_seed(0)
    model = Everything()
    return model, trace(model, torch.zeros(SHAPE))


def names(graph: Graph, group: str, tap: str = "activation") -> list[tuple[str, bool]]:
    return [(t.layer, t.reads_input) for t in taps_of(graph, graph.group(group), tap)]


def heard(model: nn.Module, graph: Graph, taps: list[Tap], images: Tensor) -> list[Tensor]:
    parts: list[list[Tensor]] = [[] for _ in taps]
    visit(model, graph, taps, images, lambda number, maps: parts[number].append(maps.clone()))
    return [torch.cat(p) for p in parts]


def test_which_layers_are_tapped():
    _, graph = example()
    assert {g.name: g.channels for g in graph.groups} == {"stem": 8, "squeeze": 4, "point": 6, "tokens": 5, "last": 2}
    assert names(graph, "stem") == [("depth", True), ("point", True)]  # not the gate: a pooled map has one position
    assert names(graph, "squeeze") == [("excite", True)]  # where there is nothing better
    assert names(graph, "point") == [("tokens", True), ("last", True)]
    assert names(graph, "tokens") == [("mix", True)]
    assert names(graph, "last") == [("head", True)]
    assert names(graph, "stem", "conv") == [("stem", False), ("excite", False), ("depth", False)]
    with pytest.raises(ConvpareError, match="no tap 'relu'; choose one of activation, conv"):
        taps_of(graph, graph.groups[0], "relu")


def test_maps_are_those_of_the_channels():
    model, graph = example()
    images = torch.randn(5, *SHAPE[1:])
    model.eval()
    with torch.no_grad():
        stem = F.relu(model.bn(model.stem(images)))
        gated = stem * torch.sigmoid(model.excite(F.relu(model.squeeze(stem.mean((2, 3), keepdim=True)))))
        deep = F.relu(model.depth(gated))
        point = F.relu(model.point(deep))
        tokens = F.relu(model.tokens(point.permute(0, 2, 3, 1)))
        mixed = point + model.mix(tokens).permute(0, 3, 1, 2)
        last = F.relu(model.last(mixed))
    expected = {
        ("stem", "depth"): gated,
        ("stem", "point"): deep.unflatten(1, (8, 2)).flatten(2),  # two of a channel's copies side by side
        ("point", "tokens"): point,
        ("point", "last"): mixed,
        ("tokens", "mix"): tokens.permute(0, 3, 1, 2),
        ("last", "head"): last.flatten(2),
    }
    for group in graph.groups:
        taps = taps_of(graph, group, "activation")
        for tap, maps in zip(taps, heard(model, graph, taps, images), strict=True):
            assert maps.shape[:2] == (5, group.channels)
            if (group.name, tap.layer) in expected:
                assert torch.allclose(maps, expected[group.name, tap.layer], atol=1e-6), (group.name, tap.layer)
    (maps,) = heard(model, graph, [taps_of(graph, graph.group("stem"), "conv")[0]], images)
    with torch.no_grad():
        assert torch.allclose(maps, model.stem(images), atol=1e-6)


def test_part_of_a_layers_channels():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.b(x), self.a(x)], 1))

    model = Halves()
    graph = trace(model, torch.zeros(SHAPE))
    (a,), (b,) = (taps_of(graph, graph.group(name), "activation") for name in ("a", "b"))
    assert a.channels.ravel().tolist() == [6, 7, 8, 9]
    assert b.channels.ravel().tolist() == list(range(6))


def test_a_tap_with_copies_lays_them_side_by_side():
    tap = Tap("g", "l", True, np.array([[0, 2], [1, 3]]))
    x = torch.arange(8.0).reshape(1, 4, 2)
    assert torch.equal(tap.maps(x, "conv"), torch.tensor([[[0.0, 1, 4, 5], [2.0, 3, 6, 7]]]))
    one = Tap("g", "l", True, np.array([[2], [0]]))
    assert torch.equal(one.maps(x, "conv"), x[:, [2, 0]])
    assert torch.equal(one.maps(torch.ones(2, 4), "linear"), torch.ones(2, 2))
    assert one.maps(torch.ones(2, 7, 4), "linear").shape == (2, 2, 7)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(2, 4, 1, 1))
        self.unused = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return F.conv2d(y, self.kernel) + F.conv2d(y, self.unused.weight)


def test_layers_that_do_not_run_as_modules():
    model = Functional()
    graph = trace(model, torch.zeros(SHAPE))
    (tap,) = taps_of(graph, graph.group("first"), "activation")
    assert tap.layer == "unused"  # it might run; the other cannot
    with pytest.raises(ConvpareError, match="layer 'unused' does not run as a module of its own"):
        visit(model, graph, [tap], torch.zeros(SHAPE), lambda *_: None)
    with pytest.raises(ConvpareError, match="layer 'kernel' does not run as a module"):
        module_of(model, "kernel")
    assert module_of(model, "first") is model.first
    (tap,) = taps_of(graph, graph.group("first"), "conv")
    visit(model, graph, [tap], torch.zeros(SHAPE), lambda *_: None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_and_errors_are_told():
    model, graph = example()
    taps = taps_of(graph, graph.group("stem"), "activation")
    with pytest.raises(ConvpareError, match=r"the model failed on images of shape \(2, 4, 6, 6\): "):
        visit(model, graph, taps, torch.zeros(2, 4, 6, 6), lambda *_: None)

    def fail(*_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        visit(model, graph, taps, torch.zeros(SHAPE), fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_running_leaves_modes_and_gradients():
    model, _ = example()
    model.train()
    model.bn.eval()
    before = [m.training for m in model.modules()]
    mean = model.bn.running_mean.clone()
    sizes = []
    handle = model.stem.register_forward_hook(
        lambda _, inputs, output: sizes.append((len(output), output.requires_grad))
    )
    run(model, torch.zeros(7, *SHAPE[1:]), batch_size=3)
    handle.remove()
    assert sizes == [(3, False), (3, False), (1, False)]
    assert before == [m.training for m in model.modules()]
    assert torch.equal(mean, model.bn.running_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_suit_the_model(dtype: torch.dtype):
    model = nn.Conv2d(3, 2, 1).to(dtype)
    assert suited(torch.zeros(SHAPE), model).dtype is dtype
    images = torch.zeros(SHAPE)
    assert suited(images, nn.ReLU()) is images
    run(model, images)
