"""What every surgery must fulfil, on any network: asserted in full by `assert_exact`; and how tests read a graph."""

import copy
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from nets import Net, conv
from torch import Tensor, fx, nn

from convpare.graph import Graph, removed, self_check, trace
from convpare.graph.check import _in_double
from convpare.graph.structure import Form
from convpare.planning.cost import count, layer_cost, total_cost

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)
OUTPUT = "the model's output"
WHOLE: tuple[Form, ...] = ("module", "graph")  # the forms that tell a whole model apart
FOLLOWS_NOT = "takes a number from its forward that does not follow them"
FIXED = "combines them with a tensor of fixed size"
MADE = re.compile(r"channel_shuffle_\d+|c_.*|lifted_tensor_\d+")  # buffers that a graph form has and its module has not


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, affine parameters and slopes that are none of them 0 or 1, so that nothing cancels."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(x: Tensor | None, low: float, high: float) -> None:
        if x is not None:
            x.copy_(torch.rand(x.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
            if isinstance(module, BATCH_NORMS):
                uniform(module.running_mean, -0.3, 0.3)
                uniform(module.running_var, 0.5, 1.5)
            if isinstance(module, nn.PReLU):
                uniform(module.weight, 0.1, 0.4)
    return model


def calibrate(model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    """Statistics of noise in every norm that keeps some, so that the signal does not fade in a deep untrained net."""
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    generator = torch.Generator().manual_seed(11)
    dtype = next(model.parameters()).dtype
    model.eval()
    for m in norms:
        m.train()
        m.momentum = 1.0
    with torch.no_grad():
        model(*(torch.randn(4, *shape[1:], generator=generator).to(dtype) for shape in shapes))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


def random_keep(graph: Graph, seed: int, share: float = 0.3, *, marked: bool = False) -> np.ndarray:
    """A mask that drops `share` of the channels of every group (at least one where there are two), at random.

    Groups that by nature change the others (`Group.inexact`) stay whole unless `marked`.
    """
    rng = np.random.default_rng(seed)
    keep = graph.keep_all()
    for group in graph.groups:
        if group.inexact and not marked:
            continue
        gone = min(max(1, round(share * group.channels)), group.channels - 1)
        keep[group.start + rng.choice(group.channels, gone, replace=False)] = False
    return keep


def leaves(tree: object) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree
    return [leaf for item in items for leaf in leaves(item)]


def outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies of what `model` returns in evaluation mode, and its modes as they were."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        result = [x.clone() for x in leaves(model.eval()(*inputs))]
    for module, training in modes:
        module.training = training
    return result


def assert_attributes_true(model: nn.Module) -> None:
    """Every module says of itself what the shapes of its tensors say."""
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            first, second = m.weight.shape[:2]
            ins, outs = (first, second * m.groups) if m.transposed else (second * m.groups, first)
            assert (m.in_channels, m.out_channels) == (ins, outs), name
            assert ins % m.groups == 0, name
            assert outs % m.groups == 0, name
            assert m.bias is None or len(m.bias) == outs, name
        elif isinstance(m, nn.Linear):
            assert (m.out_features, m.in_features) == tuple(m.weight.shape), name
            assert m.bias is None or len(m.bias) == m.out_features, name
        elif isinstance(m, BATCH_NORMS):
            for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                assert tensor is None or len(tensor) == m.num_features, name
        elif isinstance(m, nn.PReLU):
            assert len(m.weight) == m.num_parameters, name
    for name, p in model.named_parameters():
        assert p.is_contiguous(), name
        assert p.is_leaf, name


@dataclass
class Witness:
    """The state of a model and of the random generators, to compare with later."""

    model: nn.Module

    def __post_init__(self) -> None:
        for number, p in enumerate(self.model.parameters()):  # gradients and flags that surgery must leave alone
            p.grad = torch.full_like(p, 0.5)
            p.requires_grad_(number % 5 != 3)
        for number, module in enumerate(self.model.modules()):
            module.training = number % 3 == 1
        self.seen = self._state()

    def _state(self) -> list[object]:
        tensors = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]
        state: list[object] = [
            (name, id(x), x._version, x.detach().clone().numpy().tobytes(), x.requires_grad) for name, x in tensors
        ]
        state += [(name, id(p.grad), p.grad.numpy().tobytes()) for name, p in self.model.named_parameters()]
        state += [(name, m.training, _plain(m)) for name, m in self.model.named_modules()]
        state += [torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()]
        return [*state, torch.is_grad_enabled(), torch.get_default_dtype()]

    def assert_untouched(self) -> None:
        now = self._state()
        assert len(now) == len(self.seen)
        for before, after in zip(self.seen, now, strict=True):
            assert before == after


def _plain(module: nn.Module) -> dict[str, object]:
    return {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple | bool | type(None))}


def assert_exact(
    build: Callable[[], nn.Module], shapes: Sequence[tuple[int, ...]], seeds: Sequence[int] = (0, 1),
    form: Form = "module",
) -> Graph:  # fmt: skip
    """All that is promised of a surgery, at 30 % random channels of every exact group; returns the graph.

    Zeroed == removed in float64; the output differs from the whole net's, so that the check is not vacuous; the cost
    is as predicted, layer by layer; the attributes are true; the weights load into the same surgery done anew; and
    the original is as it was. In the graph form the whole graph is the same function as the module. Channels that by
    nature change the others can go, too: the net still runs, at the cost that was predicted.
    """
    torch.manual_seed(0)
    model = calibrate(randomise(build()), shapes)
    inputs = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in shapes)
    dense = outputs(model, inputs)
    witness = Witness(model)
    graph = trace(model, inputs, form)
    witness.assert_untouched()
    if form == "graph":
        _assert_same_function(model, graph, inputs)
    for seed in seeds:
        keep = random_keep(graph, seed)
        assert (not keep.all()) == any(group.channels > 1 and not group.inexact for group in graph.groups)
        check = self_check(model, graph, keep)
        assert check.passed, check
        assert (check.tolerance, check.unproved) == (1e-9, ())
        small = removed(model, graph, keep)
        _assert_taken_over(model, graph, keep, small)
        assert_attributes_true(small)
        got = outputs(small, inputs)
        assert [x.shape for x in got] == [x.shape for x in dense]
        assert all(bool(torch.isfinite(x).all()) for x in got)
        if not keep.all():
            assert max(relative_difference(a, b) for a, b in zip(dense, got, strict=True)) > 0.05
        _assert_cost_as_predicted(graph, keep, small, inputs)
        with torch.random.fork_rng(devices=[]):
            again = removed(randomise(build(), seed=99), graph, keep)
        again.load_state_dict(small.state_dict(), strict=True)
        for a, b in zip(got, outputs(again, inputs), strict=True):
            assert relative_difference(a, b) <= 1e-4  # memory laid out otherwise rounds otherwise
    _assert_marked_groups_run(model, graph, inputs, dense)
    witness.assert_untouched()
    return graph


def _assert_same_function(model: nn.Module, graph: Graph, inputs: tuple[Tensor, ...]) -> None:
    """The whole captured graph, as a module of its own, is `model`."""
    wide, noise = copy.deepcopy(model).double(), [x.double() for x in inputs]
    source = wide if graph.folded else model  # `double` parts buffers that are tied; folding rounds
    whole = _in_double(removed(source, graph, graph.keep_all()))
    for a, b in zip(outputs(wide, noise), outputs(whole, noise), strict=True):
        assert relative_difference(a, b) <= 1e-12


def _assert_marked_groups_run(
    model: nn.Module, graph: Graph, inputs: tuple[Tensor, ...], dense: Sequence[Tensor]
) -> None:
    marked = [group for group in graph.groups if group.inexact]
    if not marked:
        return
    keep = random_keep(graph, 0, marked=True)
    check = self_check(model, graph, keep)
    assert check.passed, check
    assert check.unproved == tuple(group.name for group in marked if group.channels > 1)
    small = removed(model, graph, keep)
    _assert_taken_over(model, graph, keep, small)
    assert_attributes_true(small)
    assert [x.shape for x in outputs(small, inputs)] == [x.shape for x in dense]
    _assert_cost_as_predicted(graph, keep, small, inputs)


def relative_difference(expected: Tensor, got: Tensor) -> float:
    with torch.no_grad():
        return float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))


def _assert_taken_over(model: nn.Module, graph: Graph, keep: np.ndarray, small: nn.Module) -> None:
    """Names, modes, `requires_grad` and shapes are as they should be, and no memory is shared."""
    if graph.form == "graph":
        _assert_graph_form(model, graph, keep, small)
    else:
        assert [(n, type(m), m.training) for n, m in model.named_modules()] == [
            (n, type(m), m.training) for n, m in small.named_modules()
        ]
        assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
            (n, p.requires_grad) for n, p in small.named_parameters()
        ]
    assert all(p.grad is None for p in small.parameters())
    theirs = {p.data_ptr() for p in [*model.parameters(), *model.buffers()] if p.numel()}
    assert not theirs & {p.data_ptr() for p in [*small.parameters(), *small.buffers()] if p.numel()}


def _assert_graph_form(model: nn.Module, graph: Graph, keep: np.ndarray, small: nn.Module) -> None:
    assert isinstance(small, fx.GraphModule)
    norms = {n for n, m in small.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert {m.training for n, m in small.named_modules() if n not in norms} == {model.training}
    assert all(small.get_submodule(n).training == model.get_submodule(n).training for n in norms)
    known, held = (
        {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers(remove_duplicate=False))}
        for m in (model, small)
    )
    assert all(name in known or MADE.fullmatch(name) for name in held)
    assert set(small.state_dict()) == set(held)
    for name, tensor in held.items():
        if name in graph.shapes:
            assert list(tensor.shape) == [len(graph.kept((name, a), keep)) for a in range(tensor.ndim)], name
        if name in known:
            assert isinstance(tensor, nn.Parameter) == isinstance(known[name], nn.Parameter), name
            assert (tensor.dtype, tensor.requires_grad) == (known[name].dtype, known[name].requires_grad), name
    assert {name for name, _ in small.named_parameters()} == graph.parameters <= set(known)


def _assert_cost_as_predicted(graph: Graph, keep: np.ndarray, small: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    predicted = total_cost(graph, keep)
    measured = count(small, inputs)
    assert measured.layers == {layer.name: layer_cost(graph, layer, keep) for layer in graph.layers}
    assert measured.not_counted == graph.not_counted
    assert measured.total.params == sum(p.numel() for p in small.parameters())
    assert measured.total == predicted
    whole = total_cost(graph, graph.keep_all())
    if not keep.all():
        assert predicted.macs < whole.macs
        assert predicted.params < whole.params


# ----------------------------------------------------------------------------------------------------- reading a graph


def graph_of(forward, shape: tuple[int, ...] = (2, 3, 8, 8), form: Form = "module", **parts) -> Graph:
    return trace(Net(forward, **parts), torch.zeros(shape), form)


def between(middle, channels: int, after: int, form: Form = "module", **parts: nn.Module | Tensor) -> Graph:
    """The graph of conv a (3 → `channels`), `middle`, conv z (`after` → 2)."""
    ends = {"a": conv(3, channels), "z": conv(after, 2)}
    return graph_of(lambda net, x: net.z(middle(net, net.a(x))), form=form, **ends, **parts)


def units(graph: Graph, name: str, axis: int = 0) -> list[int]:
    return graph.units[name, axis].tolist()


def groups(graph: Graph) -> list[tuple]:
    return [(g.name, g.channels, g.producers, g.consumers) for g in graph.groups]


def marked(graph: Graph) -> dict[str, str]:
    """Group → why the others change when some of its channels go."""
    return {g.name: g.inexact for g in graph.groups if g.inexact}


def frozen(graph: Graph) -> dict[str, list[tuple[int, str]]]:
    """Layer → what stays there, the model's output aside."""
    found: dict[str, list[tuple[int, str]]] = {}
    for f in graph.frozen:
        if f.reason != OUTPUT:
            found.setdefault(f.layer, []).append((f.channels, f.reason))
    return found
