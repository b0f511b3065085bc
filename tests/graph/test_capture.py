"""A model that cannot be captured gets one clear message, and is left as it was either way."""

import logging
import random

import numpy as np
import pytest
import torch
from checks import Witness, random_keep, randomise
from nets import Net, conv
from torch import nn

from convpare.errors import ConvpareError
from convpare.graph import removed, self_check, trace
from convpare.planning.cost import count, total_cost


def small() -> nn.Module:
    return nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), conv(4, 2))


def branching() -> nn.Module:
    """What no part of can be captured."""
    return Net(lambda net, x: x * net.w if x.sum() > 0 else net.act(x), w=torch.ones(3, 1, 1), act=nn.ReLU())


def test_wrong_number_of_channels():
    with pytest.raises(ConvpareError) as caught:
        trace(small(), torch.zeros(1, 5, 8, 8))
    message = str(caught.value)
    assert message.startswith("Sequential does not run on inputs of shape (1, 5, 8, 8): RuntimeError: ")
    assert "expected input[1, 5, 8, 8] to have 3 channels" in message
    assert "Give example inputs of the shape that it expects" in message


def test_image_too_small():
    with pytest.raises(ConvpareError, match=r"does not run on inputs of shape \(1, 3, 1, 1\)"):
        trace(small(), torch.zeros(1, 3, 1, 1))


def test_wrong_number_of_inputs():
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConvpareError, match=r"inputs of shape \(1, 3, 8, 8\), \(1, 3, 8, 8\): TypeError: "):
        trace(small(), (image, image))


def test_forward_that_branches_on_values():
    with pytest.raises(ConvpareError) as caught:
        trace(branching(), torch.zeros(1, 3, 8, 8))
    message = str(caught.value)
    assert message.startswith("Net runs on inputs of shape (1, 3, 8, 8), but torch.export cannot capture it: ")
    assert "branch on tensor values" in message
    assert message.endswith("None of its submodules can be captured either.")
    assert "\n" not in message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([torch.zeros(1, 3, 8, 8)], "a list;"),
        ("cat.png", "a str;"),
        (np.zeros((1, 3, 8, 8)), "a ndarray;"),
        (None, "a NoneType;"),
        ({"x": torch.zeros(1, 3, 8, 8)}, "a dict;"),
        ((), "a tuple of nothing;"),
        ((1, 3, 8, 8), "a tuple of int, int, int, int;"),
        ((torch.zeros(1, 3, 8, 8), 2), "a tuple of Tensor, int;"),
    ],
)
def test_inputs_that_are_no_tensors(given: object, named: str):
    with pytest.raises(ConvpareError) as caught:
        trace(small(), given)
    assert f"example_inputs is {named} expected a tensor, or a tuple of tensors" in str(caught.value)


@pytest.mark.parametrize(
    ("build", "shape", "passes"),
    [(small, (2, 3, 8, 8), True), (small, (2, 5, 8, 8), False), (branching, (2, 3, 8, 8), False)],
)
def test_model_and_random_state_are_left_alone(build, shape: tuple[int, ...], passes: bool):
    model = build()
    seen: list[tuple[int, ...]] = []
    model.register_forward_hook(lambda module, args, result: seen.append(tuple(result.shape)))
    before = [len(m._forward_hooks) for m in model.modules()]
    names = [sorted(vars(m)) for m in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    witness = Witness(model)  # also puts some of the modules in training mode, and some not
    assert {m.training for m in model.modules()} == {True, False}
    if passes:
        trace(model, torch.zeros(shape))
    else:
        with pytest.raises(ConvpareError):
            trace(model, torch.zeros(shape))
    witness.assert_untouched()
    assert [len(m._forward_hooks) for m in model.modules()] == before
    assert [sorted(vars(m)) for m in model.modules()] == names


def test_random_numbers_in_the_forward_cost_none_outside():
    model = Net(lambda net, x: net.a(x + torch.rand(1, 1, 8, 8)), a=conv(3, 4))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert [layer.name for layer in graph.layers] == ["a"]


def test_gradients_may_be_on_or_off():
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert trace(small(), torch.zeros(1, 3, 8, 8, requires_grad=enabled)).channels == 4
            assert torch.is_grad_enabled() == enabled


def test_nothing_is_logged_by_a_failing_capture(capfd: pytest.CaptureFixture[str]):
    levels = {name: logging.getLogger(name).level for name in ("torch.export", "torch._subclasses.fake_tensor")}
    for model, shape in [(branching(), (1, 3, 8, 8)), (small(), (1, 5, 8, 8))]:
        with pytest.raises(ConvpareError):
            trace(model, torch.zeros(shape))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert levels == {name: logging.getLogger(name).level for name in levels}


def test_same_model_same_graph():
    first, second = (trace(small(), torch.zeros(1, 3, 8, 8)) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert {axis: ids.tolist() for axis, ids in first.units.items()} == {
        axis: ids.tolist() for axis, ids in second.units.items()
    }


def test_modules_that_do_not_run_are_named():
    model = Net(lambda net, x: net.a(x), a=conv(3, 4), spare=nn.Sequential(conv(4, 4), nn.BatchNorm2d(4)))
    assert trace(model, torch.zeros(1, 3, 8, 8)).unreached == ("spare.0", "spare.1")


# ------------------------------------------------------------------------------------------------- captured in parts


def parted(**parts: nn.Module) -> nn.Module:
    """A forward that branches on a value, around submodules that can be captured."""

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        y = net.stem(x)
        return net.head(2 * y if x.sum() > 0 else y)

    stem = nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6))
    return Net(forward, **{"stem": stem, "head": nn.Sequential(conv(6, 5), nn.ReLU(), conv(5, 2)), **parts})


def test_submodules_that_can_be_captured_are():
    """Their inner channels go; those that run between them stay."""
    torch.manual_seed(0)
    model = randomise(parted()).eval()
    witness = Witness(model)
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    witness.assert_untouched()
    assert [part.name for part in graph.parts] == ["stem", "head"]
    assert [(g.name, g.channels) for g in graph.groups] == [("stem.0", 4), ("head.0", 5)]
    assert {f.layer: f.reason for f in graph.frozen} == {
        name: f"the output of {name.partition('.')[0]}, beyond which nothing could be captured"
        for name in ("stem.3", "head.2")
    }
    keep = random_keep(graph, 0)
    assert self_check(model, graph, keep).passed
    small = removed(model, graph, keep)
    assert (small.stem[0].weight.shape[0], small.stem[3].weight.shape) == (3, (6, 3, 1, 1))
    for x in (torch.ones(2, 3, 8, 8), -torch.ones(2, 3, 8, 8)):  # both branches
        assert small(x).shape == model(x).shape
    assert count(small, torch.zeros(2, 3, 8, 8)).total == total_cost(graph, keep)


def test_a_part_that_runs_twice_is_one():
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return net.a(net.a(x)) if x.sum() <= 0 else net.a(x)

    torch.manual_seed(0)
    model = Net(forward, a=nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3)))
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    assert [part.name for part in graph.parts] == ["a", "a"]
    assert [(g.name, g.channels) for g in graph.groups] == [("a.0", 4)]
    assert graph.layer("a.0").positions == 2 * 2 * 64
    assert self_check(model, graph, random_keep(graph, 0)).passed


def test_a_submodule_that_runs_outside_of_the_parts_stays():
    """A weight that a captured part shares with a module that runs by itself."""
    shared = conv(3, 3)

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return net.a(net.inner(x)) if net.inner(x).sum() <= 0 else x

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) if x.sum() <= 0 else x

    model = Net(forward, inner=Branching(), a=nn.Sequential(shared, nn.ReLU(), conv(3, 2)))
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    for unit in range(graph.channels):
        keep = graph.keep_all()
        keep[unit] = False
        assert removed(model, graph, keep)(torch.zeros(2, 3, 8, 8)).shape == (2, 2, 8, 8)


def test_a_parameter_that_is_read_outside_of_the_parts_stays():
    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(net.a(x), net.a[0].weight) if x.sum() <= 0 else x

    model = Net(forward, a=nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3)))
    graph = trace(model, torch.zeros(2, 3, 8, 8))
    assert graph.channels in (0, 4)
    keep = graph.keep_all()
    keep[:1] = False
    assert removed(model, graph, keep)(torch.zeros(2, 3, 8, 8)).shape == (2, 4, 8, 8)


def test_the_graph_form_needs_the_whole():
    with pytest.raises(ConvpareError, match=r"torch\.export cannot capture it"):
        trace(parted(), torch.zeros(2, 3, 8, 8), "graph")
