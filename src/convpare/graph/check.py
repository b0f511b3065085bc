"""The proof of every surgery: the network with channels zeroed everywhere and the one without them are one function."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from convpare.errors import ConvpareError
from convpare.graph.links import fed
from convpare.graph.parts import noise
from convpare.graph.structure import Call, Graph, Group
from convpare.graph.surgery import removed, zeroed
from convpare.graph.trace import trace
from convpare.modes import eval_mode
from convpare.notebook import html_text

TOLERANCE = 1e-9
NARROW_TOLERANCE = 1e-4  # of a captured graph against its module in float32
RAISED = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, ZeroDivisionError)


@dataclass(frozen=True)
class SelfCheck:
    """Zeroed == removed in float64: the largest difference of the outputs, relative to the largest output.

    `unproved` names the groups that the proof leaves out, because their removal by nature changes the others. `narrow`
    is the difference of the graph form from its module in the module's own type, where the two cannot be compared in
    float64 (a forward that computes something in float32 whatever it is given); its tolerance is 1e-4. `rounding`, of a
    check that failed, is how much the last bits of the weights alone change the outputs: where that is about as much,
    the network magnifies roundings, and nothing can be proved of it to this tolerance.
    """

    max_relative_error: float
    tolerance: float = TOLERANCE
    unproved: tuple[str, ...] = ()
    narrow: float | None = None
    rounding: float | None = None

    @property
    def passed(self) -> bool:
        alike = self.narrow is None or self.narrow <= NARROW_TOLERANCE
        return self.max_relative_error <= self.tolerance and alike

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        text = f"self-check {verdict}: relative error {self.max_relative_error:.1e} (tolerance {self.tolerance:.0e})"
        if self.rounding is not None:
            text += f"; the last bits of the weights alone change the outputs by {self.rounding:.1e}"
        if self.unproved:
            text += f"; groups that by nature change the others are not part of it ({len(self.unproved)})"
        if self.narrow is not None:
            text += f"; the graph form and its module, not in float64: {self.narrow:.1e} ({NARROW_TOLERANCE:.0e})"
        return text

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return html_text(str(self))

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "max_relative_error": self.max_relative_error,
            "tolerance": self.tolerance,
            "unproved": list(self.unproved),
            "narrow": self.narrow,
            "rounding": self.rounding,
        }


def self_check(model: nn.Module, graph: Graph, keep: np.ndarray, seed: int = 0) -> SelfCheck:
    """Compare, in float64 and evaluation mode, `model` with the dropped channels zeroed and with them removed.

    Both are copies. The inputs are normal noise of the traced shapes from a generator of their own. The graph form is
    compared with the module that it was captured from, too.
    """
    inputs = calls_on_noise(model, graph, seed)
    exact = keep.copy()
    for group in graph.groups:
        exact[group.units] |= group.inexact is not None
    errors = [_difference(model, graph, exact, inputs)]
    rounding = None if errors[0] <= TOLERANCE else _rounding(model, graph, exact, inputs)
    narrow = None
    if graph.form == "graph":
        infidelity = _infidelity(model, graph, inputs)
        if infidelity <= TOLERANCE:
            errors.append(infidelity)
        else:
            narrow = _narrow_infidelity(model, graph, inputs)
    unproved = tuple(g.name for g in graph.groups if g.inexact and not keep[g.units].all())
    if unproved:
        errors.append(_runs(model, graph, keep))
    return SelfCheck(float(np.max(errors)), unproved=unproved, narrow=narrow, rounding=rounding)


def culprits(model: nn.Module, graph: Graph, keep: np.ndarray, seed: int = 0) -> list[Group]:
    """The groups whose removal, each alone, fails the self-check."""
    inputs = calls_on_noise(model, graph, seed)
    found = []
    for group in graph.groups:
        alone = graph.keep_all()
        alone[group.units] = keep[group.units]
        if not alone.all() and not group.inexact and not _difference(model, graph, alone, inputs) <= TOLERANCE:
            found.append(group)
    return found


def calls_on_noise(model: nn.Module, graph: Graph, seed: int = 0) -> list[Call]:
    """The calls to compare on: of the whole model, or of the parts of it that were captured."""
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    whole = Call("", tuple(torch.empty(shape, device="meta") for shape in graph.inputs), {})
    return [noise(call, generator, device) for call in graph.parts or (whole,)]


def _cast(calls: Sequence[Call], model: nn.Module) -> list[Call]:
    """The same calls in the type of the model's parameters."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    found = []
    for call in calls:
        args, kwargs = tree_map_only(Tensor, cast, (call.args, dict(call.kwargs)))
        found.append(replace(call, args=args, kwargs=kwargs))
    return found


def _runs(model: nn.Module, graph: Graph, keep: np.ndarray) -> float:
    """Whether the smaller network, which must give other values, gives finite ones of the same shapes."""
    inputs = _cast(calls_on_noise(model, graph, 0), model)
    try:
        pairs = list(zip(outputs_of(model, inputs), outputs_of(removed(model, graph, keep), inputs), strict=True))
    except RAISED:
        return float("inf")
    return 0.0 if all(a.shape == b.shape and bool(torch.isfinite(b).all()) for a, b in pairs) else float("inf")


def _infidelity(model: nn.Module, graph: Graph, inputs: list[Call]) -> float:
    """How far the whole graph form is from the module in float64; infinity where one of them does not run so."""
    wide = copy.deepcopy(model).double()
    try:
        expected = outputs_of(wide, inputs)
    except RAISED:
        return float("inf")
    return compared(expected, lambda: outputs_of(_in_double(removed(wide, graph, graph.keep_all())), inputs))


def _narrow_infidelity(model: nn.Module, graph: Graph, inputs: list[Call]) -> float:
    """The same in the type of the model's parameters."""
    narrow = _cast(inputs, model)
    whole = removed(model, graph, graph.keep_all())
    return compared(outputs_of(model, narrow), lambda: outputs_of(whole, narrow))


def _difference(model: nn.Module, graph: Graph, keep: np.ndarray, inputs: list[Call]) -> float:
    dense, small = zeroed(model, graph, keep), removed(model, graph, keep)
    try:
        whole = outputs_of(_in_double(dense), inputs)
    except RAISED:  # a forward that writes out float32: its operators, in float64
        try:
            dense, small = _captured(zeroed(model, graph, keep), graph), _captured(removed(model, graph, keep), graph)
            whole = outputs_of(_in_double(dense), inputs)
        except (*RAISED, ConvpareError) as cause:
            first = str(cause).strip().partition("\n")[0]
            raise ConvpareError(
                f"{type(model).__name__} cannot be self-checked: with weights and inputs in float64 it does not run "
                f"({type(cause).__name__}: {first[:300]}). Its forward must not convert to a type that it writes out."
            ) from cause
    small = _in_double(small)
    return compared(whole, lambda: outputs_of(small, inputs))


def _rounding(model: nn.Module, graph: Graph, keep: np.ndarray, inputs: list[Call], draws: int = 3) -> float | None:
    """The largest relative change of the zeroed network's outputs when the last bits of its weights move."""
    net = _in_double(zeroed(model, graph, keep))
    generator = torch.Generator().manual_seed(0)
    try:
        expected = outputs_of(net, inputs)
    except RAISED:  # it runs in float32 alone
        return None
    moved = [compared(expected, lambda: outputs_of(_last_bits_moved(net, generator), inputs)) for _ in range(draws)]
    return float(np.max(moved))


def _last_bits_moved(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with the last bit of every parameter moved up, down or not at all."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            if p.is_floating_point():
                p.mul_(1 + torch.randint(-1, 2, p.shape, generator=generator).to(p) * torch.finfo(p.dtype).eps)
    return other


def _captured(net: nn.Module, graph: Graph) -> nn.Module:
    like = next(p for p in net.parameters() if p.is_floating_point())
    traced = trace(net, tuple(torch.zeros(s, dtype=like.dtype, device=like.device) for s in graph.inputs), form="graph")
    return removed(net, traced, traced.keep_all())


def compared(whole: list[Tensor], compute: Callable[[], list[Tensor]]) -> float:
    """The largest relative difference from what `compute` gives."""
    if not any(x.numel() for x in whole):
        raise ConvpareError("the model returns no floating-point numbers, so that nothing can be compared")
    try:
        pairs = list(zip(whole, compute(), strict=True))
    except RAISED:
        return float("inf")  # the smaller net does not run: as wrong as can be
    errors = []
    for expected, got in pairs:
        if expected.shape != got.shape:
            return float("inf")
        if not expected.numel():
            continue
        scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        errors.append(float((expected - got).abs().max() / scale))
    return float(np.max(errors))  # NaN if any is


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else dtype


def _in_double(net: nn.Module) -> nn.Module:
    """In float64, where a captured graph says float32 too."""
    if isinstance(net, fx.GraphModule):
        for node in net.graph.nodes:
            node.args, node.kwargs = tree_map_only(torch.dtype, _wide, (node.args, node.kwargs))
        net.recompile()
    return net.double()


@contextlib.contextmanager
def _default_dtype(wide: bool) -> Iterator[None]:
    """Tensors that a forward makes without naming their type are of the type of its inputs."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64 if wide else before)
        yield
    finally:
        torch.set_default_dtype(before)


def outputs_of(model: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """What the calls return, of parts that hand tensors to each other what nothing else reads apart."""
    found: list[Tensor] = []
    made: list[list[Any]] = []
    wide = any(x.dtype == torch.float64 for x in _leaves([call.args for call in calls]))
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]), _default_dtype(wide):
        for call in calls:
            torch.default_generator.manual_seed(0)  # a forward that draws numbers draws the same ones in both nets
            given = fed(call, made)
            result = model.get_submodule(call.name)(*given.args, **given.kwargs)
            made.append(tree_leaves(result) if call.name else [])
            inner = {id(made[-1][leaf]) for leaf in call.inner}
            found += [x for x in _leaves(result) if id(x) not in inner]
    return [x for x in found if x.is_floating_point()]


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
