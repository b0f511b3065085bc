"""The graph form: the captured graph as a module of its own, which trains, moves, and is saved like any other."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import (
    FOLLOWS_NOT,
    WHOLE,
    assert_exact,
    between,
    frozen,
    outputs,
    random_keep,
    randomise,
    relative_difference,
    units,
)
from nets import Net, StandardisedConv, conv, sandwich
from torch import Tensor, fx, nn

from convpare.artifact import load, save
from convpare.errors import ConvpareError
from convpare.graph import Graph, removed, self_check, trace
from convpare.graph.graphform import graph_module
from convpare.graph.structure import Form

SHAPE = [(2, 3, 8, 8)]
IMAGE = torch.zeros(2, 3, 8, 8)
EIGHT = list(range(8))


class SlicedConv(nn.Conv2d):
    """A layer of PyTorch's, with a number of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y[:, 3:].sigmoid(), y[:, :3]], 1)


def noise(batch: int = 4, channels: int = 3, seed: int = 3) -> Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def traced(model: nn.Module, *shapes: tuple[int, ...]) -> Graph:
    dtype = next(model.parameters()).dtype
    return trace(model, tuple(torch.zeros(shape, dtype=dtype) for shape in shapes or SHAPE), "graph")


def whole(model: nn.Module, *shapes: tuple[int, ...]) -> nn.Module:
    """The graph form with all its channels."""
    graph = traced(model, *shapes)
    return removed(model, graph, graph.keep_all())


def cut(model: nn.Module, *shapes: tuple[int, ...], seed: int = 0) -> nn.Module:
    graph = traced(model, *shapes)
    return removed(model, graph, random_keep(graph, seed))


def normed(p: float) -> nn.Module:
    """Batch norms of two kinds and dropouts of three, one without parameters, one in place."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.drop1(F.relu(net.norm1(net.first(x))))
        y = net.drop2(net.norm2(net.second(y)).relu()).mean((2, 3))
        return net.head(net.drop3(net.norm3(y)))

    torch.manual_seed(0)
    net = Net(
        forward, first=conv(3, 8, 3), norm1=nn.BatchNorm2d(8, eps=1e-3, momentum=0.3), drop1=nn.Dropout2d(p),
        second=conv(8, 6), norm2=nn.BatchNorm2d(6, affine=False), drop2=nn.Dropout(p, inplace=True),
        norm3=nn.BatchNorm1d(6, momentum=None), drop3=nn.AlphaDropout(p), head=nn.Linear(6, 3),
    )  # fmt: skip
    return randomise(net)


# ------------------------------------------------------------------------------------------------------------- training


def test_training_is_that_of_the_module():
    """Same loss, gradients and running statistics, step by step, and the same network in evaluation mode."""
    model = normed(0.0).train()
    form = whole(model)
    assert form.training
    ours, theirs = (torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (form, model))
    for step in range(3):
        x = noise(seed=step)
        losses = []
        for net, optimiser in ((form, ours), (model, theirs)):
            optimiser.zero_grad()
            loss = net(x).square().sum()
            loss.backward()
            losses.append(loss.item())
            optimiser.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        for name, p in model.named_parameters():
            assert torch.allclose(form.get_parameter(name).grad, p.grad, atol=1e-6), name
        assert_same_state(form, model)
    x = noise(seed=9)
    assert relative_difference(outputs(model, [x])[0], outputs(form, [x])[0]) < 1e-6
    assert form.norm1.num_batches_tracked.item() == 3


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name


def test_batch_norms_and_dropouts_are_modules():
    form = whole(normed(0.25))
    kinds = {name: type(module) for name, module in form.named_modules() if type(module) is not nn.Module and name}
    assert kinds == {
        "norm1": nn.BatchNorm2d, "norm2": nn.BatchNorm2d, "norm3": nn.BatchNorm1d, "dropout_0": nn.Dropout2d,
        "dropout_1": nn.Dropout, "dropout_2": nn.AlphaDropout,
    }  # fmt: skip
    assert (form.norm1.eps, form.norm1.momentum, form.norm1.num_features) == (1e-3, 0.3, 8)
    assert (form.norm2.affine, form.norm2.weight, form.norm3.momentum) == (False, None, None)
    assert {form.get_submodule(f"dropout_{n}").p for n in range(3)} == {0.25}


def test_dropout_drops_in_training_alone():
    x = noise()
    for form in (whole(normed(0.5)), cut(normed(0.5))):
        form.train()
        assert not torch.equal(form(x), form(x))
        form.eval()
        assert torch.equal(form(x), form(x))


def test_batch_norms_without_statistics_normalise_the_batch_in_both_modes():
    model = nets.Residual(nn.BatchNorm2d(8, track_running_stats=False), 8, 8)
    form, x = whole(model), noise()
    for mode in (True, False):
        assert relative_difference(model.train(mode)(x), form.train(mode)(x)) < 1e-6


def test_what_is_cut_trains():
    """The loss of a cut net falls, and its statistics move."""
    form = cut(normed(0.1)).train()
    before = form.norm1.running_mean.clone()
    optimiser = torch.optim.Adam(form.parameters(), lr=0.03)
    x, target, losses = noise(16), torch.arange(16) % 3, []
    for _ in range(30):
        optimiser.zero_grad()
        loss = F.cross_entropy(form(x), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert len(before) == 6
    assert not torch.equal(before, form.norm1.running_mean)


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_flags_are_taken_over(training: bool):
    model = normed(0.1).train(training)
    model.first.weight.requires_grad_(False)
    model.norm1.bias.requires_grad_(False)
    form = cut(model)
    assert {module.training for module in form.modules()} == {training}
    assert {name for name, p in form.named_parameters() if not p.requires_grad} == {"first.weight", "norm1.bias"}
    assert all(p.is_leaf and p.grad is None and p.is_contiguous() for p in form.parameters())


def test_the_mode_of_each_batch_norm_is_taken_over():
    model = normed(0.1).train()
    model.norm1.eval()
    form = cut(model)
    assert [form.norm1.training, form.norm2.training] == [False, True]


def test_batch_norms_that_share_a_parameter_train():
    model = nets.tied_parameter().train()
    form = whole(model)
    x = noise()
    assert relative_difference(model(x), form(x)) < 1e-6


def test_dropout_that_always_drops():
    form = whole(Net(lambda net, x: net.b(F.dropout(net.a(x), 0.5)), a=conv(3, 8), b=conv(8, 2)))
    assert not torch.equal(outputs(form, [noise()])[0], outputs(form, [noise()])[0])


# --------------------------------------------------------------------------------------------- a module like any other


def test_copied_saved_and_loaded():
    model = normed(0.1)
    form, x = cut(model), noise()
    (expected,) = outputs(form, [x])
    assert torch.equal(outputs(copy.deepcopy(form), [x])[0], expected)
    graph = traced(model)
    other = removed(randomise(normed(0.1), seed=5), graph, random_keep(graph, 0))
    assert not torch.equal(outputs(other, [x])[0], expected)
    other.load_state_dict(form.state_dict(), strict=True)
    assert torch.equal(outputs(other, [x])[0], expected)
    file = io.BytesIO()
    torch.save(form, file)
    file.seek(0)
    assert torch.equal(outputs(torch.load(file, weights_only=False), [x])[0], expected)


def test_nothing_is_shared_with_the_model():
    model = normed(0.1)
    form = whole(model)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for x in form.state_dict().values():
            x.add_(1)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("build", [lambda: normed(0.1), lambda: sandwich(nets.shuffle), nets.PlainTensor])
def test_in_float64(build: Callable[[], nn.Module]):
    form, x = cut(build()), noise()
    wide = copy.deepcopy(form).to(torch.float64)
    (result,) = outputs(wide, [x.double()])
    assert result.dtype == torch.float64
    assert relative_difference(outputs(form, [x])[0].double(), result) < 1e-5
    assert {b.dtype for name, b in wide.named_buffers() if "channel_shuffle" in name} <= {torch.int64}


@pytest.mark.parametrize("build", [lambda: normed(0.1), lambda: sandwich(nets.shuffle), nets.weight_norm])
def test_exported_again(build: Callable[[], nn.Module]):
    form, x = cut(build()).eval(), noise(1)
    program = torch.export.export(form, (x,))
    assert torch.allclose(program.module()(x), form(x), atol=1e-6)


def test_traced_again():
    """What is left can be cut again, in either form."""
    form = cut(sandwich(nets.uneven_parts))
    for again in ("graph", "module"):
        graph = trace(form, IMAGE, again)
        keep = random_keep(graph, 1)
        assert self_check(form, graph, keep).passed
        if again == "graph":
            assert [(g.name, g.channels) for g in graph.groups] == [("first", 11)]
            assert removed(form, graph, keep).first.weight.shape[0] == 8


@pytest.mark.parametrize(
    ("middle", "after"),
    [
        (lambda net, y: y * F.pad(y, (0, 0, 0, 0, -15, 0)), 16),
        (lambda net, y: torch.cat([y.new_zeros(2, 1, 8, 8).copy_(F.pad(y, (0, 0, 0, 0, 0, -15))), y], 1), 17),
        (lambda net, y: torch.cat([F.pixel_shuffle(part, 2) for part in y.split(4, 1)], 1), 4),
    ],
)
def test_what_becomes_one_channel_stays(middle: Any, after: int):
    """An axis of one channel has no labels; what it came from must not go."""
    model = sandwich(middle, c_after=after)
    for form in ("module", "graph"):
        graph = trace(model, IMAGE, form)
        for group in graph.groups:
            keep = graph.keep_all()
            keep[group.units] = False
            keep[group.start] = True
            assert self_check(model, graph, keep).passed
        assert graph.channels < 16
        assert any("one channel" in frozen.reason for frozen in graph.frozen)


def test_a_size_that_is_left_open_when_all_channels_of_a_part_go():
    """The two channels of the part go; what was -1 is then written out, of the batch as its size."""
    closed = sandwich(lambda net, y: y[:, 4:6].unflatten(1, (-1, 2)).sum(2) * y)
    batch = sandwich(lambda net, y: y + y[:, 4:6].permute(0, 2, 3, 1).reshape(-1, 2).sum() / 7)
    for model in (closed, batch):
        graph = trace(model, IMAGE, "graph")
        keep = graph.keep_all()
        keep[graph.groups[0].start + np.arange(4, 6)] = False
        assert graph.channels == 16
        assert self_check(model, graph, keep).passed
        small = removed(model, graph, keep)
        assert small(torch.zeros(3, *IMAGE.shape[1:])).shape[0] == 3


def test_a_range_that_is_empty_at_the_end():
    """As an earlier removal leaves one: where it begins follows the channels before it."""
    model = sandwich(lambda net, y: torch.cat([y.narrow(1, 16, 0), y.narrow(1, 0, 16)], 1))
    graph = trace(model, IMAGE, "graph")
    keep = random_keep(graph, 0)
    assert 0 < keep.sum() < 16
    assert self_check(model, graph, keep).passed


@pytest.mark.parametrize(
    "build",
    [
        nets.UNet, lambda: sandwich(nets.shuffle), lambda: nets.squeeze_excitation("view"), nets.nested_outputs,
        lambda: nets.tokens(nets.Attention(12, 3), 12), lambda: normed(0.1),
        lambda: sandwich(lambda net, y: y.reshape(y.shape[0] * 2, 8, 8, 8).relu().reshape(y.shape)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 5])
def test_batches_of_any_size(build: Callable[[], nn.Module], batch: int):
    torch.manual_seed(0)
    model = build().eval()
    form = whole(model)
    x = noise(batch)
    for a, b in zip(outputs(model, [x]), outputs(form, [x]), strict=True):
        assert a.shape == b.shape
        assert relative_difference(a, b) < 1e-5
    assert [len(y) for y in outputs(cut(model), [x])] == [len(y) for y in outputs(model, [x])]


def test_saved_as_an_artifact(tmp_path: Path):
    """Without the code that it was captured from."""
    for number, build in enumerate((lambda: normed(0.1), lambda: sandwich(nets.shuffle), nets.nested_outputs)):
        form, x = cut(build()).eval(), noise()
        again = load(save(form, tmp_path / str(number)))
        assert isinstance(again, fx.GraphModule)
        for a, b in zip(outputs(form, [x]), outputs(again, [x]), strict=True):
            assert torch.equal(a, b)


def test_only_a_trace_of_the_graph_form_can_be_built():
    model = normed(0.1)
    graph = trace(model, IMAGE)
    with pytest.raises(ConvpareError, match="holds no captured graph; trace it with form='graph'"):
        graph_module(model, graph, graph.keep_all())
    with pytest.raises(ConvpareError, match="form is 'eager'; expected one of module, graph"):
        trace(model, IMAGE, "eager")


# -------------------------------------------------------------------------------------------------- inputs and outputs


def test_outputs_in_their_containers():
    model = nets.nested_outputs()
    result = cut(model)(noise())
    assert list(result) == ["logits", "maps"]
    assert (type(result["maps"]), type(result["maps"][1])) == (tuple, list)
    several = Net(lambda net, x: (net.b(net.a(x)), None, {"scale": 2, "name": "x"}), a=conv(3, 4), b=conv(4, 2))
    first, second, third = cut(several)(noise())
    assert (tuple(first.shape), second, third) == ((4, 2, 8, 8), None, {"scale": 2, "name": "x"})


def test_several_inputs():
    model = nets.two_inputs()
    shapes = [(2, 3, 8, 8), (2, 2, 8, 8)]
    x = [noise(2), noise(2, 2)]
    assert torch.equal(outputs(model, x)[0], outputs(whole(model, *shapes), x)[0])
    assert_exact(nets.two_inputs, shapes, (0,), "graph")
    ignored = Net(lambda net, x, z: net.b(net.a(z)), a=conv(3, 4), b=conv(4, 2))
    assert torch.equal(outputs(ignored, x[:1] * 2)[0], outputs(cut(ignored, *SHAPE * 2), x[:1] * 2)[0]) is False


def test_tied_weights_stay_one():
    form = cut(nets.tied_parameter())
    assert "two.weight" not in form.state_dict()
    assert form.norm2.running_mean is form.norm1.running_mean
    assert form.norm2.weight is form.norm1.weight
    assert form.one.weight.shape == (8, 6, 3, 3)
    x = noise()
    form(x).sum().backward()
    with torch.no_grad():
        before = form(x)
        form.one.weight.zero_()
        assert not torch.equal(before, form(x))


def test_a_module_that_runs_twice():
    model = nets.tied_module()
    form = whole(model)
    assert set(form.state_dict()) == {
        f"{name}.{kind}" for name in ("first", "one", "last") for kind in ("weight", "bias")
    }
    calls = [n for n in form.graph.nodes if n.op == "call_function" and "conv2d" in str(n.target)]
    assert len(calls) == 5
    norm = nn.BatchNorm2d(8)
    shared = Net(lambda net, x: net.b(net.n(net.n(net.a(x)).relu())), a=conv(3, 8), n=norm, b=conv(8, 2)).train()
    form, x = whole(shared), noise()
    assert relative_difference(shared(x), form(x)) < 1e-6
    assert_same_state(form, shared)
    assert shared.n.num_batches_tracked.item() == 2


def test_tensors_are_made_beside_the_input():
    """On any device: here on "meta", which knows shapes alone."""

    def made(net: Net, y: Tensor) -> Tensor:
        steps = torch.arange(8.0, device=y.device) + torch.linspace(0, 1, 8, device=y.device)
        return (y + torch.zeros(1, 8, 1, 1, device=y.device) + y.new_ones(y.shape)) * steps + torch.ones_like(y)

    model = sandwich(made, 8)
    form = cut(model)
    assert tuple(form(noise()).shape) == (4, 5, 8, 8)
    shaped = copy.deepcopy(form).to("meta")(noise().to("meta"))
    assert (shaped.device.type, tuple(shaped.shape)) == ("meta", (4, 5, 8, 8))
    moved = {
        str(n.target) for n in form.graph.nodes if "device" in n.kwargs and isinstance(n.kwargs["device"], fx.Node)
    }
    assert {"aten.zeros.default", "aten.arange.default", "aten.linspace.default"} <= moved
    assert not [n for n in form.graph.nodes if isinstance(n.kwargs.get("device"), torch.device)]


def test_a_constant_of_the_forward_is_a_buffer():
    model = sandwich(lambda net, y: y * torch.tensor([0.5, 2.0]).sum(), 8)
    form = cut(model)
    made = set(form.state_dict()) - set(model.state_dict())
    assert len(made) == 1
    assert form.state_dict()[made.pop()].tolist() == [0.5, 2.0]


def test_a_module_called_as_the_dropouts_are():
    net = Net(lambda net, x: net.dropout_0(net.d(net.a(x))), a=conv(3, 4), d=nn.Dropout(), dropout_0=conv(4, 2))
    assert torch.equal(outputs(whole(net), [noise()])[0], outputs(net, [noise()])[0])


def test_a_block_under_autocast():
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = net.b(net.a(x))
        return net.z(y.to(x.dtype))

    net = Net(forward, a=conv(3, 4), b=conv(4, 4), z=conv(4, 2))
    with pytest.raises(ConvpareError, match=r"under wrap_with_autocast, which the graph form cannot hold"):
        whole(net)


# ------------------------------------------------------------------------------------------------------ folded weights


def test_weight_norm_is_folded():
    """A plain weight, of which every channel can go; the model itself keeps its two parameters."""
    torch.manual_seed(0)
    graph = assert_exact(nets.weight_norm, SHAPE, form="graph")
    assert all(not g.inexact for g in graph.groups)
    model = nets.weight_norm().double()
    with torch.no_grad():
        model.inner.parametrizations.weight.original0.mul_(1.7)
    form = whole(model)
    name = "inner.parametrizations.weight.original1"
    assert torch.allclose(form.get_parameter(name), model.inner.weight, atol=1e-12)
    assert form.get_parameter(name).requires_grad
    assert set(model.state_dict()) - set(form.state_dict()) == {"inner.parametrizations.weight.original0"}
    assert not torch.allclose(dict(model.named_parameters())[name], model.inner.weight)


def standardised(**options: object) -> nn.Module:
    return Net(
        lambda net, x: net.last(net.inner(F.relu(net.first(x)))), first=conv(3, 8),
        inner=StandardisedConv(8, 12, 3, **options), last=conv(12, 4),
    )  # fmt: skip


@pytest.mark.parametrize("gain_first", [True, False])
def test_standardised_weights_are_folded(gain_first: bool):
    graph = assert_exact(lambda: standardised(gain_first=gain_first), SHAPE, form="graph")
    assert [(g.name, g.channels, g.inexact) for g in graph.groups] == [("first", 8, None), ("inner", 12, None)]
    torch.manual_seed(0)
    model = standardised().double()
    weight = whole(model).inner.weight
    assert torch.allclose(weight.mean((1, 2, 3)), torch.zeros(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(weight.std((1, 2, 3), unbiased=False), model.inner.gain.flatten(), rtol=0.05)


def test_a_weight_computed_from_a_buffer_is_folded():
    """A masked kernel."""

    class Masked(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(8, 8, 3)
            self.register_buffer("mask", torch.ones(8, 8, 3, 3).tril_())

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * self.mask, self.bias)

    graph = assert_exact(lambda: nets.Residual(Masked(), 8, 8), SHAPE, form="graph")
    assert [g.channels for g in graph.groups] == [8, 8]


def test_a_weight_computed_from_an_activation_is_not_folded():
    model = Net(lambda net, x: F.conv2d(net.a(x), net.k * x.mean()), a=conv(3, 4), k=torch.randn(5, 4, 1, 1))
    graph = traced(model)
    assert graph.folded == {}
    assert self_check(model, graph, random_keep(graph, 0)).passed


def called_twice(net: Net, x: Tensor) -> Tensor:
    return net.last(net.inner(net.inner(net.first(x))))


def read_bare(net: Net, x: Tensor) -> Tensor:
    y = net.first(x)
    return net.last(net.inner(y) + F.conv2d(y, net.inner.weight))


@pytest.mark.parametrize("forward", [called_twice, read_bare])
def test_a_weight_that_is_read_elsewhere_is_not_folded(forward: Callable[[Net, Tensor], Tensor]):
    model = Net(forward, first=conv(3, 8), inner=StandardisedConv(8, 8, 3), last=conv(8, 4)).double()
    form, x = whole(model), noise().double()
    assert relative_difference(outputs(model, [x])[0], outputs(form, [x])[0]) < 1e-12


def test_a_module_whose_weight_is_folded_is_reached():
    assert traced(standardised()).unreached == ()


# ---------------------------------------------------------------------------------------------- numbers of the forward

Middle = Callable[[Net, Tensor], Tensor]

# 8 channels, what is done to them, channels after it, parts; only the graph form follows these
FOLLOWED: dict[str, tuple[Middle, int, dict[str, nn.Module | Tensor]]] = {
    "chunk": (lambda net, y: torch.cat([p * (n + 1) for n, p in enumerate(y.chunk(3, 1))], 1), 8, {}),
    "split": (lambda net, y: torch.cat([p * (n + 1) for n, p in enumerate(y.split(3, 1))], 1), 8, {}),
    "split, list": (lambda net, y: torch.cat([p * (n + 1) for n, p in enumerate(y.split([2, 4, 2], 1))], 1), 8, {}),
    "tensor_split": (lambda net, y: torch.cat([p * (n + 1) for n, p in enumerate(y.tensor_split(3, 1))], 1), 8, {}),
    "shuffle": (nets.shuffle_all_written, 16, {}),
    "slices": (lambda net, y: torch.cat([y[:, 5:].relu(), y[:, 2:5], y[:, :4] * 2], 1), 10, {}),
    "slices from the end": (lambda net, y: torch.cat([y[:, :-5].cos(), y[:, -5:]], 1), 8, {}),
    "narrow": (lambda net, y: torch.cat([y.narrow(1, 3, 4).relu(), y.narrow(1, 0, 5)], 1), 9, {}),
    "select": (lambda net, y: y * y.select(1, 5)[:, None] + y[:, -2][:, None], 8, {}),
    "every second but the first": (lambda net, y: y[:, 2::2], 3, {}),
    "every third of some": (lambda net, y: y[:, 1:7:3], 2, {}),
    "padded": (lambda net, y: F.pad(y, (0, 0, 0, 0, 2, 3)) + net.other(y), 13, {"other": conv(8, 13)}),
    "padded up to": (
        lambda net, y: F.pad(y, (0, 0, 0, 0, 0, 12 - y.shape[1])) + net.other(y), 12, {"other": conv(8, 12)},
    ),
    "cropped": (lambda net, y: F.pad(y, (0, 0, 0, 0, -1, -3)) + net.other(y), 4, {"other": conv(8, 4)}),
    "cropped and padded": (lambda net, y: F.pad(y, (0, 0, 0, 0, -2, 1)) + net.other(y), 7, {"other": conv(8, 7)}),
    "unflatten": (lambda net, y: y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), 8, {}),
    "view, heads": (lambda net, y: y.reshape(y.shape[0], 2, 4, 8, 8).amax(1), 4, {}),
    "view, flat": (lambda net, y: y.reshape(y.shape[0], 8, 64).relu().reshape(y.shape[0], 8, 8, 8), 8, {}),
    "view, with the batch": (lambda net, y: y.reshape(y.shape[0] * 8, 1, 8, 8).relu().reshape(-1, 8, 8, 8), 8, {}),
    "view, parts of their own": (
        lambda net, y: net.part(y.reshape(y.shape[0] * 4, 2, 8, 8)).reshape(-1, 8, 8, 8), 8, {"part": conv(2, 2)},
    ),
    "expand": (lambda net, y: net.gate(y).expand(y.shape[0], 8, 8, 8) * y, 8, {"gate": conv(8, 1)}),
    "expand of channels": (
        lambda net, y: net.gate(y.mean((2, 3), keepdim=True)).expand(-1, 8, 8, 8) * y, 8, {"gate": conv(8, 8)},
    ),
    "groups": (
        lambda net, y: F.conv2d(y, net.kernel, padding=1, groups=8), 16, {"kernel": torch.randn(16, 1, 3, 3)}
    ),
    "groups, transposed": (
        lambda net, y: F.conv_transpose2d(y, net.kernel, padding=1, groups=8), 8, {"kernel": torch.randn(8, 1, 3, 3)}
    ),
    "made": (lambda net, y: y + torch.full((1, 8, 1, 1), 0.5), 8, {}),
    "group norm": (lambda net, y: F.group_norm(y, 4), 8, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWED)
def test_numbers_are_followed(name: str):
    middle, after, parts = FOLLOWED[name]

    def build() -> nn.Module:
        return sandwich(middle, 16 if name == "shuffle" else 8, after, **copy.deepcopy(parts))

    graph = assert_exact(build, SHAPE, form="graph")
    assert graph.channels > 1
    stays = {f.reason for f in graph.frozen} - {"the model's output"}
    assert stays == ({"select in Net picks this channel by its number"} if name == "select" else set())
    module = trace(build(), IMAGE)
    assert module.channels < graph.channels
    assert any(f.reason.endswith(FOLLOWS_NOT) or "not equal" in f.reason for f in module.frozen)


def test_einsum_is_followed():
    graph = assert_exact(
        lambda: sandwich(
            lambda net, y: torch.einsum("bchw,bc->bchw", y, net.gate(y.mean((2, 3)))), 8, gate=nn.Linear(8, 8)
        ),
        SHAPE,
        form="graph",
    )
    assert [(g.name, g.channels) for g in graph.groups] == [("first", 8)]


def test_uneven_survivors_of_chunks():
    """One half may keep 1 channel and the other 4."""
    torch.manual_seed(0)
    model = sandwich(lambda net, y: torch.cat([p * (n + 1) for n, p in enumerate(y.chunk(2, 1))], 1), 8)
    graph = traced(model)
    assert units(graph, "first.weight") == EIGHT
    keep = graph.keep_all()
    keep[[0, 1, 3]] = False
    form = removed(model, graph, keep)
    (split,) = [n for n in form.graph.nodes if "split" in str(n.target)]
    assert list(split.args[1]) == [1, 4]
    assert self_check(model, graph, keep).passed
    x, stays = noise(), [2, 4, 5, 6, 7]
    y = F.relu(model.first(x))[:, stays] * torch.tensor([1.0, 2, 2, 2, 2])[:, None, None]
    expected = F.conv2d(y, model.last.weight[:, stays], model.last.bias)
    assert torch.allclose(form(x), expected, atol=1e-5)


def test_a_shuffle_is_a_choice_of_positions():
    torch.manual_seed(0)
    model = sandwich(nets.shuffle, 8)
    graph = traced(model)
    assert units(graph, "first.weight") == EIGHT
    assert units(graph, "last.weight", 1) == [0, 2, 4, 6, 1, 3, 5, 7]
    keep = graph.keep_all()
    keep[[0, 3, 4]] = False
    form = removed(model, graph, keep)
    assert form.state_dict()["channel_shuffle_0"].tolist() == [1, 3, 0, 2, 4]  # of 1, 2, 5, 6, 7: 2, 6, 1, 5, 7


@pytest.mark.parametrize(
    "middle",
    [
        lambda net, y: torch.channel_shuffle(y, 4),
        lambda net, y: y.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2),
        lambda net, y: y.reshape(y.shape[0], 4, -1, 8, 8).permute(0, 2, 1, 3, 4).reshape(y.shape),
        lambda net, y: y.reshape(y.shape[0], 4, -1, 8, 8).swapaxes(2, 1).contiguous().reshape(y.shape),
    ],
)
def test_a_shuffle_that_is_not_seen_ties_its_slots(middle: Middle):
    graph = assert_exact(lambda: sandwich(middle, 8), SHAPE, (0,), "graph")
    assert [(g.name, g.channels) for g in graph.groups] == [("first", 2)]


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize(
    ("middle", "says"),
    [
        (lambda net, y: torch.cumprod(y, 3), "no rule for operator cumprod in Net on 2×8×8×8"),
        (
            lambda net, y: F.grid_sample(y, y[:, :2].movedim(1, 3), align_corners=False),
            "no rule for operator grid_sampler in Net on 2×8×8×8",
        ),
        (lambda net, y: y.roll(3, 1), "roll in Net rolls the axis that they lie on"),
        (lambda net, y: y[:, [3, 1, 0, 2, 7, 6, 5, 4]], "index in Net picks channels by computed positions"),
        (lambda net, y: y.amax(1, keepdim=True) + y, "amax in Net reduces over them"),
    ],
)
def test_what_freezes_in_both_forms(middle: Middle, says: str, form: Form):
    graph = between(middle, 8, 8, form)
    assert frozen(graph) == {"a": [(8, says)]}


# -------------------------------------------------------------------------------------------- every choice of channels


# what is done to 8 channels, channels after it, parts: what is easily taken for exact
TRICKY: dict[str, tuple[Middle, int, dict[str, nn.Module | Tensor]]] = {
    "the last, all of them": (
        lambda net, y: torch.cat([y[:, :-2], y[:, -2:].sigmoid()], 1), 8, {}),
    "narrow from the end": (
        lambda net, y: torch.cat([y.narrow(1, -3, 3).sigmoid(), y.narrow(1, 0, 5)], 1), 8, {}),
    "windows of channels": (lambda net, y: y.unfold(1, 3, 1).permute(0, 1, 4, 2, 3).flatten(1, 2), 18, {}),
    "expanded as another": (
        lambda net, y: torch.cat([y, net.other(y).expand_as(y)], 1), 16, {"other": conv(8, 1)}),
    "viewed as another": (
        lambda net, y: torch.cat([y, net.other(y).relu().view_as(y)], 1), 16, {"other": conv(8, 8)}),
    "gathered by channels": (
        lambda net, y: net.other(y).flatten(2).gather(2, y.flatten(2).argmax(2, keepdim=True))[..., None], 8,
        {"other": conv(8, 8)}),
    "picked by channels": (
        lambda net, y: y.flatten(2)[:, :, net.other(y).mean((0, 2, 3)).abs().long()][..., None], 8,
        {"other": conv(8, 5)}),
    "a sum after a written part": (lambda net, y: written(y).sum(1, keepdim=True), 1, {}),
    "a sum after a scalar": (lambda net, y: (y + net.shift).sum(1, keepdim=True), 1, {"shift": torch.ones(1)}),
    "a sum after a gate": (
        lambda net, y: (y.sigmoid() * net.gate(y)).sum(1, keepdim=True), 1, {"gate": conv(8, 1)}),
    "a sum after a place": (
        lambda net, y: (y + net.place).sum(1, keepdim=True), 1, {"place": torch.randn(1, 1, 8, 8)}),
    "a sum after a norm of rows": (lambda net, y: net.norm(y).sum(1, keepdim=True), 1, {"norm": nn.LayerNorm(8)}),
    "a sum after logsumexp": (lambda net, y: y.logsumexp((2, 3), keepdim=True).sum(1, keepdim=True), 1, {}),
    "the smallest": (lambda net, y: torch.linalg.vector_norm(y, -float("inf"), dim=1, keepdim=True), 1, {}),
    "features of a group norm": (
        lambda net, y: net.out(net.norm(net.wide(y))), 8,
        {"wide": nn.Linear(8, 6), "norm": nn.GroupNorm(2, 8), "out": nn.Linear(6, 2)}),
    "a sum after a part in place": (lambda net, y: in_place(y).sum(1, keepdim=True), 1, {}),
    "squeezed": (lambda net, y: y.mean((2, 3), keepdim=True).squeeze()[:, :, None, None], 8, {}),
    "a convolution of one's own": (lambda net, y: net.own(y), 8, {"own": SlicedConv(8, 8, 1)}),
    "looked up by channels": (
        lambda net, y: net.table(y.mean((2, 3)).abs().long()).sum(1)[..., None, None], 6, {"table": nn.Embedding(5, 6)}
    ),
    "noise of as many channels": (lambda net, y: y + torch.randn(1, 8, 1, 1), 8, {}),
    "divided by a parameter": (lambda net, y: y / net.by, 8, {"by": torch.rand(8, 1, 1) + 1}),
    "divided by their length": (lambda net, y: y / y.norm(dim=(2, 3), keepdim=True), 8, {}),
    "noise like the channels": (lambda net, y: y + torch.rand_like(y), 8, {}),
}  # fmt: skip


def in_place(y: Tensor) -> Tensor:
    out = y.clone()
    out[:, :, 0].sigmoid_()
    return out


def written(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :, 1:] = y.sigmoid()[:, :, :-1]
    return out


WRONG = {
    **{
        (f"divided by {what}", form): "0 / 0 in the zeroed network, while the smaller one is right"
        for what in ("a parameter", "their length")
        for form in WHOLE
    },
}
CHOICES = [
    pytest.param(
        name, form, marks=pytest.mark.xfail(reason=WRONG[name, form], strict=True) if (name, form) in WRONG else ()
    )
    for name in TRICKY
    for form in WHOLE
]


@pytest.mark.parametrize(("name", "form"), CHOICES)
def test_every_choice_of_channels_is_exact(name: str, form: Form):
    """Every group alone loses its first channel, its last, its second half, and all but the first."""
    middle, after, parts = TRICKY[name]
    torch.manual_seed(0)
    model = randomise(sandwich(middle, 8, after, **copy.deepcopy(parts))).eval()
    graph = trace(model, IMAGE, form)
    for group in graph.groups:
        n = group.channels
        if group.inexact or n < 2:
            continue
        for first, last in {(0, 1), (n - 1, n), (n - 2, n), (n // 2, n), (1, n)}:
            keep = graph.keep_all()
            keep[group.start + first : group.start + last] = False
            assert self_check(model, graph, keep).passed, (group.name, first, last)


def test_parts_that_hold_one_channel_several_times():
    """Copies side by side, split channel by channel: a part has no axis that tells which of them would go."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.stack([(a := net.a(x)), a], 2).flatten(1, 2)
        first, _, _, last = y.tensor_split(4, 1)
        return net.b(torch.cat([last, first], 1).flatten(1))

    torch.manual_seed(0)
    model = Net(forward, a=conv(3, 4), b=nn.Linear(4 * 64, 3))
    graph = trace(model, torch.zeros(2, 3, 8, 8), form="graph")
    assert not graph.groups
    assert [f.reason for f in graph.frozen if f.layer == "a"] == ["split_with_sizes in Net makes a part of one channel"]
