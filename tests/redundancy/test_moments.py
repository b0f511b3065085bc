"""Second moments of inputs and of Jacobians, against autograd and against the sums written out."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import Graph, trace
from convpare.redundancy.moments import Sampling, first_tensor, input_moments, moments_of_both, output_moments

ALL = Sampling(per_unknown=10**6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.b = nn.Conv2d(6, 4, (1, 3), groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.head = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.a(x.mul_(1)))  # in place, twice
        return self.head(torch.relu(self.up(F.relu(self.b(y), inplace=True))).mean((2, 3)))


def net() -> tuple[nn.Module, Graph, Tensor]:
    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(7, 3, 9, 9)
    return model, trace(model, images[:1]), images


def test_inputs_are_summed_over_images_and_positions():
    model, graph, images = net()
    found = input_moments(model, graph.layers, images, ALL, batch_size=3)
    seen = F.unfold(images, 3, stride=2, padding=1).movedim(1, 2).flatten(0, 1).double()
    torch.testing.assert_close(found["a"][0], seen.mT @ seen / len(seen), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        y = F.relu(model.a(images))
    pieces = F.unfold(y, (1, 3)).unflatten(1, (2, 9)).movedim(1, 0).movedim(2, 3).flatten(1, 2).double()
    torch.testing.assert_close(found["b"], pieces.mT @ pieces / pieces.shape[1], rtol=1e-5, atol=1e-6)
    assert {name: tuple(h.shape) for name, h in found.items()} == {
        "a": (1, 27, 27), "b": (2, 9, 9), "up": (1, 4, 4), "head": (1, 2, 2),
    }  # fmt: skip


def test_a_wide_layer_has_its_diagonal():
    model, graph, images = net()
    whole = input_moments(model, graph.layers, images, ALL)["a"]
    part = input_moments(model, graph.layers, images, Sampling(per_unknown=10**6, widest=20))["a"]
    torch.testing.assert_close(part, whole.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_autograd():
    """Image by image, along the directions that are drawn."""
    model, graph, images = net()
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    found = output_moments(model, graph.layers, images, Sampling(seed=3), batch_size=7)
    assert torch.equal(state, torch.random.get_rng_state())
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
    outputs: dict[str, Tensor] = {}

    def hand_on(name: str, y: Tensor) -> Tensor:
        outputs[name] = y
        return y * 1  # what comes after may change it in place

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: hand_on(name, y))
        for name in ("a", "b", "up", "head")
    ]
    out = model(images.clone())
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    gradients = dict(zip(outputs, torch.autograd.grad((out * direction).sum(), list(outputs.values())), strict=True))
    for handle in handles:
        handle.remove()
    variance = float(out.detach().double().var(0, correction=0).sum())
    for name, groups in (("a", 1), ("b", 2), ("up", 1), ("head", 1)):
        g = gradients[name]
        g = g.reshape(*g.shape[:2], -1).unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, 3).flatten(1, 2).double()
        torch.testing.assert_close(found[name], g.mT @ g / g.shape[1] / variance, rtol=1e-4, atol=1e-9)


def test_a_small_error_changes_the_output_by_so_much():
    """Of a network that is linear: the estimate is the relative error of the output itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(24, 3)).double().eval()
    images = torch.randn(3000, 3, 2, 2, dtype=torch.float64)
    sampling = Sampling(differentiated=3000)
    weights = output_moments(model, trace(model, images[:1]).layers, images, sampling, batch_size=1000)
    error = torch.randn(3000, 4, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        y = model[0](images)
        whole = model(images)
        change = (model[1:](y + error) - whole).square().sum() / (whole - whole.mean(0)).square().sum()
    rows = error.movedim(1, 3).flatten(0, 2)
    estimate = ((rows @ weights["0"][0]) * rows).sum() / 3000
    assert float(estimate) == pytest.approx(float(change), rel=0.1)
    few = output_moments(model, trace(model, images[:1]).layers, images, Sampling(differentiated=50))["0"]
    assert torch.equal(few, output_moments(model, trace(model, images[:1]).layers, images[:50])["0"])


def test_both_in_one_go():
    model, graph, images = net()
    inputs, outputs = moments_of_both(model, graph.layers, images, replace(ALL, differentiated=4), batch_size=3)
    for name, found in input_moments(model, graph.layers, images, ALL).items():
        torch.testing.assert_close(inputs[name], found, rtol=1e-5, atol=1e-6)
    for name, found in output_moments(model, graph.layers, images[:4], ALL, batch_size=3).items():
        torch.testing.assert_close(outputs[name], found, rtol=1e-6, atol=0)
    with pytest.raises(ConvpareError, match=r"the model failed on images of shape \(3, 2, 9, 9\)"):
        moments_of_both(model, graph.layers, images[:, :2], ALL, batch_size=3)


def test_first_tensor():
    x = torch.zeros(1)
    assert first_tensor({"a": [x, 3]}) is x
    with pytest.raises(ConvpareError, match="the model returns a float first"):
        first_tensor(3.0)


def test_what_cannot_be_measured_says_so():
    model, graph, images = net()
    with torch.no_grad():
        model.b.weight.fill_(float("nan"))
    with pytest.raises(ConvpareError, match="variance of the model's output over 7 images is nan"):
        output_moments(model, graph.layers, images)
    with pytest.raises(ConvpareError, match="'up' does not run as a module, or reads NaN"):
        input_moments(model, graph.layers, images)
