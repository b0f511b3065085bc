"""Factorizations as edits: layers of a model replaced by chains of plain layers, and the proof that these are right."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from convpare.errors import ConvpareError
from convpare.factorize.chain import Layout, build, is_transposed, kernel_of
from convpare.factorize.factors import Factors, chain, factorize
from convpare.factorize.forms import get_form
from convpare.factorize.graph_edit import is_operator, layer_at, put_chain_
from convpare.factorize.metric import Metric
from convpare.graph.check import calls_on_noise, compared, outputs_of
from convpare.graph.structure import Graph, Layer
from convpare.redundancy.cuts import Kernel


@dataclass(frozen=True)
class Factorize:
    """Replace a layer by a chain of plain layers.

    Attributes:
        layer: a convolution or linear layer that is a module of its own.
        form: by its name, see `forms_of`.
        ranks: as the form orders them; of one group of a grouped convolution.
        shape: of the weight that is factorized: what removals leave of the layer's.
        error: what the plan predicts.
    """

    layer: str
    form: str
    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"edit": "factorize", "layer": self.layer, "form": self.form, "ranks": list(self.ranks),
                "shape": list(self.shape), "error": self.error}  # fmt: skip


def factorized(
    model: nn.Module, edits: Sequence[Factorize], metrics: Mapping[str, Metric] | None = None
) -> tuple[nn.Module, dict[str, Factors]]:
    """A copy of `model` with these layers replaced, and the factors of each. The given model is untouched.

    Args:
        metrics: what errors of these layers cost; the weights of others count alone.

    Raises:
        ConvpareError: a layer is not there, is no module that can be replaced, or has another shape than the edit says.
    """
    small = copy.deepcopy(model)
    found: dict[str, Factors] = {}
    for edit in edits:
        layer = layer_of(small, edit.layer)
        if (shape := tuple(_weight(layer).shape)) != edit.shape:
            raise ConvpareError(
                f"the plan factorizes {edit.layer!r} with a weight of {edit.shape}, in this network it is {shape}; "
                "make a plan for this network"
            )
        found[edit.layer] = factorize(layer, edit.form, edit.ranks, (metrics or {}).get(edit.layer))
        place_(small, edit.layer, chain(layer, found[edit.layer]))
    return small, found


def truncated(model: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """A copy of `model` with the kernels that the chains stand for, in float64. The oracle for `factorized`."""
    dense = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, found in factors.items():
            wide = Factors(found.form, found.ranks, found.relative_error, found.shape,
                           tuple(Kernel(link.tensor.double()) for link in found.chained), found.transposed)  # fmt: skip
            weight = _weight(layer_of(dense, name))
            weight.copy_(wide.kernel().weight(found.transposed).to(weight.device))
    return dense


def chain_error(small: nn.Module, chained: nn.Module, graph: Graph, factors: Mapping[str, Factors]) -> float:
    """The largest relative difference, in float64, of a network with chains and one with the kernels they stand for.

    Args:
        graph: of the network before removals, whose inputs are those of both.
    """
    calls = calls_on_noise(small, graph)
    wide = copy.deepcopy(chained).double()

    def compute() -> list[Tensor]:
        try:
            return outputs_of(wide, calls)
        except AttributeError as error:  # a forward that reads `self.conv.weight` finds none in a chain
            raise RuntimeError(str(error)) from error

    return compared(outputs_of(truncated(small, factors), calls), compute)


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a layer that a chain can replace.

    Raises:
        ConvpareError: there is none, or others share its weight.
    """
    if isinstance(model, fx.GraphModule) and is_operator(model, name):
        return layer_at(model, name)
    modules = dict(model.named_modules(remove_duplicate=False))
    layer: nn.Module | None = modules.get(name)
    if layer is None or not name:
        raise ConvpareError(f"{name!r} is no module of {type(model).__name__} that a chain of layers can replace")
    kernel_of(layer)  # says what cannot be factorized
    weight = _weight(layer)
    others = [other for other, module in modules.items() if module is not layer for p in module.parameters(False)
              if p is weight]  # fmt: skip
    if others or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        who = f"also that of {others[0]!r}" if others else "computed from others"
        raise ConvpareError(f"the weight of {name!r} is {who}; leave this layer as it is")
    return layer


def place_(model: nn.Module, name: str, new: nn.Sequential) -> None:
    """Put a chain in place of a layer, wherever that stands."""
    if isinstance(model, fx.GraphModule) and is_operator(model, name):
        put_chain_(model, name, new)
        return
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                parent._modules[child] = new


def skeleton_(model: nn.Module, edits: Sequence[Factorize]) -> None:
    """Put chains of the right structure in place of the layers of an unpruned model; their numbers mean nothing.

    Raises:
        ConvpareError: a layer does not allow for the edit.
    """
    for edit in edits:
        layer = layer_of(model, edit.layer)
        whole, transposed = tuple(_weight(layer).shape), is_transposed(layer)
        if len(whole) != len(edit.shape) or any(a > b for a, b in zip(edit.shape, whole, strict=True)):
            raise ConvpareError(f"{edit.layer!r} has a weight of {whole}, of which {edit.shape} cannot be left")
        form, kernel = get_form(edit.form), _left(edit.shape, whole, int(getattr(layer, "groups", 1)), transposed)
        full = form.full_ranks(kernel)
        if len(full) != len(edit.ranks) or any(a > b for a, b in zip(edit.ranks, full, strict=True)):
            raise ConvpareError(f"{edit.layer!r} cannot be factorized as {edit.form} with ranks {edit.ranks}")
        shapes = form.shapes(kernel, edit.ranks, transposed)
        place_(model, edit.layer, build(layer, tuple(Kernel(torch.zeros(shape)) for shape in shapes)))


def layout_in(graph: Graph, layer: Layer, keep: np.ndarray, form: str, ranks: tuple[int, ...]) -> Layout:
    """What a layer becomes as a chain under the mask `keep` (channels,), without its numbers.

    Raises:
        ConvpareError: the form has no chain for this kernel.
    """
    kernel, transposed = shape_in(graph, layer, keep), layer.kind == "conv_transpose"
    bias = len(graph.kept((layer.bias, 0), keep)) if layer.bias else 0
    return Layout(get_form(form).shapes(kernel, ranks, transposed), transposed, bias)


def shape_in(graph: Graph, layer: Layer, keep: np.ndarray) -> Kernel:
    """The kernel of a layer under the mask `keep` (channels,), without its numbers (on the meta device)."""
    whole = graph.shapes[layer.weight]
    shape = tuple(len(graph.kept((layer.weight, axis), keep)) for axis in range(len(whole)))
    return _left(shape, whole, layer.groups, layer.kind == "conv_transpose")


def kernel_at(graph: Graph, layer: Layer, into: int, out: int) -> Kernel:
    """The kernel of a layer whose weight's axes of inputs and outputs have these sizes, without its numbers.

    Raises:
        ConvpareError: the groups cannot be told of these sizes.
    """
    whole = graph.shapes[layer.weight]
    sizes = {layer.in_axis: into, layer.out_axis: out}
    shape = tuple(sizes.get(axis, size) for axis, size in enumerate(whole))
    return _left(shape, whole, layer.groups, layer.kind == "conv_transpose")


def _left(shape: tuple[int, ...], whole: tuple[int, ...], groups: int, transposed: bool) -> Kernel:
    """What removals leave of a kernel, without its numbers; `groups` are those of the whole one."""
    if groups > 1 and whole[1] == 1:  # a group is one channel with its multiples, and goes as a whole
        groups = max(1, shape[0] // (whole[0] // groups))
    if shape[0] % groups:
        raise ConvpareError(f"a weight of {shape} cannot be left of {whole} in {groups} groups")
    blocks = torch.empty(shape, device="meta").unflatten(0, (groups, -1))
    return Kernel(blocks.transpose(1, 2) if transposed else blocks)


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight
