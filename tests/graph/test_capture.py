"""A model that cannot be captured gets one clear message, and is left as it was either way."""

import logging
import random

import numpy as np
import pytest
import torch
from checks import Witness
from nets import Net, conv
from torch import nn

from convpare.errors import ConvpareError
from convpare.graph import trace


def small() -> nn.Module:
    return nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), conv(4, 2))


def branching() -> nn.Module:
    return Net(lambda net, x: net.a(x) if x.sum() > 0 else net.b(x), a=conv(3, 4), b=conv(3, 4))


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
