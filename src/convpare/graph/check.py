"""The proof of every surgery: the network with channels zeroed everywhere and the one without them are one function."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph.structure import Graph, Group
from convpare.graph.surgery import removed, zeroed
from convpare.modes import eval_mode

TOLERANCE = 1e-9


@dataclass(frozen=True)
class SelfCheck:
    """Zeroed == removed in float64: the largest difference of the outputs, relative to the largest output."""

    max_relative_error: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        return self.max_relative_error <= self.tolerance

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return f"self-check {verdict}: relative error {self.max_relative_error:.1e} (tolerance {self.tolerance:.0e})"

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "max_relative_error": self.max_relative_error,
            "tolerance": self.tolerance,
        }


def self_check(model: nn.Module, graph: Graph, keep: np.ndarray, seed: int = 0) -> SelfCheck:
    """Compare, in float64 and evaluation mode, `model` with the dropped channels zeroed and with them removed.

    Both are copies. The inputs are normal noise of the traced shapes from a generator of their own.
    """
    return SelfCheck(_difference(model, graph, keep, _noise(model, graph, seed)))


def culprits(model: nn.Module, graph: Graph, keep: np.ndarray, seed: int = 0) -> list[Group]:
    """The groups whose removal, each alone, fails the self-check."""
    inputs = _noise(model, graph, seed)
    found = []
    for group in graph.groups:
        alone = graph.keep_all()
        alone[group.units] = keep[group.units]
        if not alone.all() and not _difference(model, graph, alone, inputs) <= TOLERANCE:
            found.append(group)
    return found


def _noise(model: nn.Module, graph: Graph, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in graph.inputs]


def _difference(model: nn.Module, graph: Graph, keep: np.ndarray, inputs: list[Tensor]) -> float:
    dense = zeroed(model, graph, keep).double()
    small = removed(model, graph, keep).double()
    try:
        whole = _outputs(dense, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as cause:
        first = str(cause).strip().partition("\n")[0]
        raise ConvpareError(
            f"{type(model).__name__} cannot be self-checked: with weights and inputs in float64 it does not run "
            f"({type(cause).__name__}: {first[:300]}). Its forward must not convert to a type that it writes out."
        ) from cause
    try:
        pairs = list(zip(whole, _outputs(small, inputs), strict=True))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, ZeroDivisionError):
        return float("inf")  # the smaller net does not run: as wrong as can be
    if not pairs:
        raise ConvpareError(f"{type(model).__name__} returns no floating-point tensor, so that nothing can be compared")
    errors = []
    for expected, got in pairs:
        if expected.shape != got.shape or not expected.numel():
            return float("inf")
        scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        errors.append(float((expected - got).abs().max() / scale))
    return float(np.max(errors))  # NaN if any is


def _outputs(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # a forward that draws numbers draws the same ones in both nets
        return [x for x in _leaves(model(*inputs)) if x.is_floating_point()]


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in _leaves(value)]
    if tree is None or isinstance(tree, int | float | str):
        return []
    raise ConvpareError(f"the model returns a {type(tree).__name__}; expected tensors in tuples, lists or dicts")
