"""A captured network run operator by operator gives what the module gives, and stops where it is told to."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.blocks import resnet20
from convpare.errors import ConvpareError
from convpare.factorize import chain, factorize
from convpare.graph.tracer import operator_name
from convpare.recovery.lockstep import Run, aligned


def batches(count: int = 2, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *(shape or (3, 16, 16)), generator=generator) for _ in range(count)]


def finish(run: Run) -> list[Tensor]:
    last = run.nodes[-1]
    run.snapshot([last])
    run.advance(len(run.nodes))
    return run.value(last)


def test_it_computes_what_the_module_computes():
    torch.manual_seed(0)
    model, given = resnet20().eval(), batches()
    got = finish(Run(model, given))
    with torch.no_grad():
        assert all(torch.allclose(a, model(x), atol=1e-6) for a, x in zip(got, given, strict=True))


class Busy(nn.Module):
    """Works in place on its input and on values that are read again; a constant, a list of outputs, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twin = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.twin.weight = self.conv.weight
        self.register_buffer("shift", torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = self.conv(x)
        z = y
        y += self.shift
        y = F.relu_(y)
        a, b = z.chunk(2, 1)
        return torch.cat([b, a * torch.tensor([3.0]), self.twin(x)], 1)


def test_in_place_operators_and_tied_parameters():
    model, given = Busy().eval(), batches()
    kept = [x.clone() for x in given]
    run = Run(model, given)
    got = finish(run)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    with torch.no_grad():
        assert all(torch.allclose(a, model(x.clone()), atol=1e-6) for a, x in zip(got, kept, strict=True))
    assert set(run.tensors.values()) == {"conv.weight", "conv.bias", "twin.bias", "shift"}
    assert run.uses == {"conv.weight": 2, "conv.bias": 1, "twin.bias": 1, "shift": 1}


def test_snapshots_outlive_what_happens_later():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)).eval()
    given = batches(1)
    run = Run(model, given)
    first, rectified = run.nodes[0], run.nodes[1]
    run.snapshot([first])
    run.advance(3)
    with torch.no_grad():
        assert torch.equal(run.value(first)[0], model[0](given[0]))
    assert (run.value(first)[0] < 0).any()
    with pytest.raises(KeyError):
        run.value(rectified)  # freed after its last use
    run.forget(first)
    with pytest.raises(KeyError):
        run.value(first)


def test_weights_that_change_on_the_way_count():
    model, given = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval(), batches(1)
    run = Run(model, given)
    run.advance(1)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(3.0)
    assert torch.equal(finish(run)[0], torch.full((3, 2, 16, 16), 3.0))


def test_alignment():
    one, same = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU())
    other, longer = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU()),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ReLU()),
    )
    run = Run(one, batches(1))
    twin = Run(same, batches(1))
    assert aligned(run, twin) == dict(zip(twin.nodes, run.nodes, strict=True))
    for wrong in (other, longer):
        with pytest.raises(
            ConvpareError, match=r"runs other operators than the original .* choose batch-norm recalibration"
        ):
            aligned(run, Run(wrong, batches(1)))
    assert [operator_name(n) for n in run.nodes] == ["aten.conv2d", "aten.relu"]


def test_alignment_of_a_layer_with_its_chain():
    """A convolution that pads circularly is two operators; of its chain each layer pads along its own axis."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Linear(16, 5, bias=False), nn.ReLU()
    )
    small = nn.Sequential(
        chain(dense[0], factorize(dense[0], "oh|iw", 2)), nn.ReLU(), chain(dense[2], factorize(dense[2], "o|i", 2)),
        nn.ReLU(),
    )  # fmt: skip
    left, right = Run(dense, batches(1)), Run(small, batches(1))
    found = aligned(left, right, ["0", "2"])
    names = ["aten.conv2d", "aten.relu", "aten.linear", "aten.relu"]
    assert [operator_name(n) for n in found] == [operator_name(n) for n in found.values()] == names
    assert [right.tensors[n.args[1]] for n in found if len(n.args) > 1] == ["0.1.weight", "2.1.weight"]
    with pytest.raises(ConvpareError, match="runs other operators"):
        aligned(left, right, ["0"])


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.conv(x).float()


def test_nested_graphs():
    with pytest.raises(ConvpareError, match=r"the forward has a nested graph .*, which cannot be run step by step"):
        Run(Autocast(), batches(1))
