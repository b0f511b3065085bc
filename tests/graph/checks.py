"""What every surgery must fulfil, on any network: asserted in full by `assert_exact`."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convpare.graph import Graph, removed, self_check, trace
from convpare.planning.cost import count, layer_cost, total_cost

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)
OUTPUT = "the model's output"


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


def random_keep(graph: Graph, seed: int, share: float = 0.3) -> np.ndarray:
    """A mask that drops `share` of the channels of every group (at least one where there are two), at random."""
    rng = np.random.default_rng(seed)
    keep = graph.keep_all()
    for group in graph.groups:
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
    build: Callable[[], nn.Module], shapes: Sequence[tuple[int, ...]], seeds: Sequence[int] = (0, 1)
) -> Graph:
    """All that is promised of a surgery, at 30 % random channels of every group; returns the graph.

    Zeroed == removed in float64; the output differs from the whole net's, so that the check is not vacuous; the cost
    is as predicted, layer by layer; the attributes are true; the weights load into the same surgery done anew; and
    the original is as it was.
    """
    torch.manual_seed(0)
    model = calibrate(randomise(build()), shapes)
    inputs = tuple(torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in shapes)
    dense = outputs(model, inputs)
    witness = Witness(model)
    graph = trace(model, inputs)
    witness.assert_untouched()
    for seed in seeds:
        keep = random_keep(graph, seed)
        assert (not keep.all()) == any(group.channels > 1 for group in graph.groups)
        check = self_check(model, graph, keep)
        assert check.passed, check
        assert check.tolerance == 1e-9
        small = removed(model, graph, keep)
        _assert_same_class(model, small)
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
            assert torch.equal(a, b)
    witness.assert_untouched()
    return graph


def relative_difference(expected: Tensor, got: Tensor) -> float:
    return float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))


def _assert_same_class(model: nn.Module, small: nn.Module) -> None:
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == [
        (n, type(m), m.training) for n, m in small.named_modules()
    ]
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in small.named_parameters()
    ]
    assert all(p.grad is None for p in small.parameters())
    theirs = {p.data_ptr() for p in [*model.parameters(), *model.buffers()] if p.numel()}
    assert not theirs & {p.data_ptr() for p in [*small.parameters(), *small.buffers()] if p.numel()}


def _assert_cost_as_predicted(graph: Graph, keep: np.ndarray, small: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    predicted = total_cost(graph, keep)
    measured = count(small, inputs)
    assert measured.total == predicted
    assert measured.layers == {layer.name: layer_cost(graph, layer, keep) for layer in graph.layers}
    assert measured.not_counted == graph.not_counted
    assert predicted.params == sum(p.numel() for p in small.parameters())
    whole = total_cost(graph, graph.keep_all())
    if not keep.all():
        assert predicted.macs < whole.macs
        assert predicted.params < whole.params
