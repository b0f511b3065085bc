"""Merge expansions into the layers that read them, where nothing nonlinear stands between.

A pointwise convolution or linear layer H from R to K > R channels that only linear layers W read is superfluous:
W' = W · H reads the R channels itself and computes the same function with fewer parameters and MACs. A batch norm with
fixed statistics after H is part of it: y = S (H x + b) + t has the constant c = S b + t, which W' takes into its bias.
Where W pads with zeros, the constant does not reach the border, so that the merge is exact only for c = 0.

Source: the merge rule behind the K/R ratio, Huang, Si, Zheng, Li (arXiv 2112.04857), in whose linear model K drops out.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from convpare.errors import ConvpareError
from convpare.graph.capture import Inputs, as_args, capture
from convpare.graph.check import RAISED, TOLERANCE, compared, outputs_of
from convpare.graph.flow import Flow, LinearMap, module_of, short
from convpare.graph.parts import noise
from convpare.graph.structure import Call
from convpare.graph.sync import sync_attributes
from convpare.graph.tracer import operator_name

Linear = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Merge:
    """An expansion that goes, and the layers that take it in.

    Attributes:
        expansion: the layer that goes, by its name in the model.
        norm: the batch norm after it, which goes with it.
        consumers: the layers that read it.
        biases: those of them that get a bias which they did not have.
        k, r: the channels that they read before and after.
        params, macs: what is saved; MACs for the example inputs, batch included.
    """

    expansion: str
    norm: str | None
    consumers: tuple[str, ...]
    biases: tuple[str, ...]
    k: int
    r: int
    params: int
    macs: int

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that it changes."""
        return (self.expansion, *self.consumers)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"consumers": list(self.consumers), "biases": list(self.biases)}


class _CannotMerge(ConvpareError):  # noqa: N818 - a reason, not an error
    """Why an expansion stays."""


def mergeable(model: nn.Module, example_inputs: Inputs) -> list[Merge]:
    """The expansions of `model` that can be merged exactly, as its weights are now, in the order of execution.

    No layer is in two of them: of expansions that follow each other the first comes first, and the next is found in the
    merged model. The model is not changed.

    Raises:
        ConvpareError: the model does not run on these inputs, or its forward cannot be captured.
    """
    found, _ = mergeable_in(Flow(model, capture(model, as_args(example_inputs))))
    chosen: list[Merge] = []
    taken: set[str] = set()
    for merge in found.values():
        if taken.isdisjoint(merge.layers):
            chosen.append(merge)
            taken.update(merge.layers)
    return chosen


def not_mergeable(model: nn.Module, example_inputs: Inputs) -> dict[str, str]:
    """The expansions (pointwise, to more channels than they read) that cannot be merged exactly, and why.

    Raises:
        ConvpareError: as `mergeable`.
    """
    return mergeable_in(Flow(model, capture(model, as_args(example_inputs))))[1]


def mergeable_in(flow: Flow) -> tuple[dict[str, Merge], dict[str, str]]:
    """Expansion → its merge, and expansion → why there is none."""
    merges: dict[str, Merge] = {}
    reasons: dict[str, str] = {}
    finder = _Finder(flow)
    for map in flow.maps.values():
        if map.is_pointwise and map.k > map.channels:
            try:
                merges[map.name] = finder.merge(map)
            except _CannotMerge as reason:
                reasons[map.name] = str(reason)
    return merges, reasons


def merged(model: nn.Module, merges: Sequence[Merge], example_inputs: Inputs) -> nn.Module:
    """A copy of `model` in which `merges` are carried out; the given one is untouched.

    Expansions and their norms become `nn.Identity`, so that the forward stays; the weights of their consumers become
    narrower, and get a bias where a constant comes in. Both networks are the same function in evaluation mode. In
    training mode the batch norms that went are missing.

    Raises:
        ConvpareError: a merge is not among those of this model as it is now, two share a layer, or the merged model is
            not the same function (float64, noise, relative 1e-9).
    """
    args = as_args(example_inputs)
    _check(model, merges, args)
    _prove(model, merges, args)
    small = copy.deepcopy(model)
    merge_(small, merges)
    return small


def merge_all(model: nn.Module, example_inputs: Inputs) -> tuple[nn.Module, tuple[Merge, ...]]:
    """A copy of `model` in which everything is merged that can be, and the merges in turn; the model itself if nothing.

    Raises:
        ConvpareError: as `mergeable` and `merged`.
    """
    done: list[Merge] = []
    while found := mergeable(model, example_inputs):
        model = merged(model, found, example_inputs)
        done += found
    return model, tuple(done)


def merged_in_turn(model: nn.Module, merges: Sequence[Merge], example_inputs: Inputs) -> nn.Module:
    """As `merged`, where later merges may be of layers that earlier ones changed.

    Raises:
        ConvpareError: as `merged`.
    """
    waiting = list(merges)
    while waiting:
        together = _disjoint(waiting)
        model = merged(model, together, example_inputs)
        waiting = waiting[len(together) :]
    return model


def _disjoint(merges: Sequence[Merge]) -> list[Merge]:
    """The first ones, as far as no layer is in two of them."""
    chosen: list[Merge] = []
    taken: set[str] = set()
    for merge in merges:
        if not taken.isdisjoint(merge.layers):
            break
        chosen.append(merge)
        taken.update(merge.layers)
    return chosen


def merge_(model: nn.Module, merges: Sequence[Merge]) -> None:
    """As `merged`, in place and without proof: what a model of the same class needs before merged weights are loaded.

    It depends on the weights in nothing but values: names and shapes come out alike for all.
    """
    for merge in merges:
        modules: Mapping[str, Any] = dict(model.named_modules())
        matrix, constant = _affine(modules[merge.expansion], modules[merge.norm] if merge.norm is not None else None)
        for name in merge.consumers:
            _absorb(modules[name], matrix, constant, biased=name in merge.biases)
        for name in filter(None, (merge.expansion, merge.norm)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity().train(modules[name].training))


class _Finder:
    """Looks for the merge of each expansion of a captured network."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.modules = dict(flow.model.named_modules())
        parameters, buffers = flow.model.named_parameters, flow.model.named_buffers
        named = [*parameters(remove_duplicate=False), *buffers(remove_duplicate=False)]
        self.owners = Counter(id(tensor) for _, tensor in named)

    def merge(self, map: LinearMap) -> Merge:
        """Raises _CannotMerge with the reason where there is none."""
        expansion = self._expansion(map)
        norm, end = self._norm(map)
        readers = self._readers(map, end)
        layers = [self._consumer(reader, map) for reader in readers]
        _, constant = _affine(expansion, norm)
        shifts = constant.is_meta or bool(constant.any())
        padded = [r.name for r, layer in zip(readers, layers, strict=True) if shifts and _pads(layer)]
        if padded:
            raise _CannotMerge(f"its bias or batch norm adds a constant, but {padded[0]} pads the border with zeros")
        gone = [*expansion.parameters(), *(norm.parameters() if norm is not None else ())]
        narrowed = [layer.weight.numel() // map.k * (map.k - map.channels) for layer in layers]
        biases = {r.name: r.k for r, layer in zip(readers, layers, strict=True) if shifts and layer.bias is None}
        params = sum(p.numel() for p in gone) + sum(narrowed) - sum(biases.values())
        macs = _positions(map) * expansion.weight.numel()
        macs += sum(_positions(reader) * n for reader, n in zip(readers, narrowed, strict=True))
        name = module_of(end) if norm is not None else None
        consumers = tuple(r.name for r in readers)
        return Merge(map.name, name, consumers, tuple(biases), map.k, map.channels, params, macs)

    def _expansion(self, map: LinearMap) -> Linear:
        layer = self._layer(map)
        if not isinstance(layer, nn.Linear) and (prod(layer.stride) > 1 or _pads(layer)):
            raise _CannotMerge("it has a stride or padding")
        if any(user.args[:1] == (map.read,) and operator_name(user).endswith("_") for user in map.read.users):
            raise _CannotMerge("what it reads is changed in place")
        return layer

    def _layer(self, map: LinearMap) -> Linear:
        module = self.modules.get(map.name)
        if type(module) not in LINEAR or module_of(map.node) != map.name or not self._is_own(map.node, module):
            raise _CannotMerge(f"{map.name} is not an nn.Conv or nn.Linear of its own that is called once")
        return cast(Linear, module)

    def _is_own(self, node: Node, module: nn.Module | None) -> bool:
        """Whether a module's tensors are read by this node alone, and stand in the model once."""
        tensors = [] if module is None else [*module.parameters(), *module.buffers()]
        read = [x for x in node.all_input_nodes if x in self.flow.tensors]
        return all(self.owners[id(x)] == 1 for x in tensors) and all(len(x.users) == 1 for x in read)

    def _norm(self, map: LinearMap) -> tuple[BatchNorm | None, Node]:
        """The batch norm after a map, and the value that the consumers read."""
        users = list(map.node.users)
        if len(users) != 1 or short(users[0]) != "batch_norm":
            return None, map.node
        node = users[0]
        module = self.modules.get(module_of(node))
        if type(module) not in BATCH_NORM or not self._is_own(node, module):
            raise _CannotMerge("the batch norm after it is not an nn.BatchNorm of its own that is called once")
        if node.args[5]:
            raise _CannotMerge("the batch norm after it takes its statistics from the batch")
        if map.kind == "linear" and map.node.meta["val"].ndim != 2:
            raise _CannotMerge("the batch norm after it normalises another axis than its channels")
        return cast(BatchNorm, module), node

    def _readers(self, map: LinearMap, end: Node) -> list[LinearMap]:
        users = list(end.users)
        after = self.flow.after(map)
        for user in users:
            if user not in self.flow.maps or user.args[0] is not end:
                between = after if after not in ("nothing", "affine") else short(user)
                raise _CannotMerge(f"{between} stands between it and the next linear layer")
        if not users:
            raise _CannotMerge("nothing reads it")
        return [self.flow.maps[user] for user in users]

    def _consumer(self, reader: LinearMap, map: LinearMap) -> Linear:
        layer = self._layer(reader)
        if reader.groups > 1:
            raise _CannotMerge(f"{reader.name}, which reads it, is grouped")
        if (reader.kind, len(reader.kernel)) != (map.kind, len(map.kernel)):
            raise _CannotMerge(f"{reader.name} reads its output along another axis")
        return layer


def _pads(layer: Linear) -> bool:
    """Whether a convolution adds anything at the border."""
    if isinstance(layer, nn.Linear) or layer.padding == "valid":
        return False
    return prod(layer.kernel_size) > 1 if layer.padding == "same" else any(layer.padding)


def _positions(map: LinearMap) -> int:
    """How often its kernel is applied."""
    return int(map.node.meta["val"].numel()) // map.k


def _affine(expansion: Linear, norm: BatchNorm | None) -> tuple[Tensor, Tensor]:
    """An expansion and its norm as y = M x + c: M (groups, K / groups, R / groups) and c (K,) in float64."""
    groups = getattr(expansion, "groups", 1)
    weight = expansion.weight.detach().double()
    matrix = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1])
    constant = weight.new_zeros(len(weight)) if expansion.bias is None else expansion.bias.detach().double()
    if norm is None:
        return matrix, constant
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    scale = (variance + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach().double())
    shift = 0 if norm.bias is None else norm.bias.detach().double()
    return matrix * scale.reshape(groups, -1, 1), (constant - mean) * scale + shift


def _check(model: nn.Module, merges: Sequence[Merge], args: tuple[Tensor, ...]) -> None:
    known, reasons = mergeable_in(Flow(model, capture(model, args)))
    for merge in merges:
        found = known.get(merge.expansion)
        if found is None or _structure(found) != _structure(merge):
            why = reasons.get(merge.expansion, "the model has no such expansion")
            raise ConvpareError(f"{merge.expansion!r} cannot be merged into {', '.join(merge.consumers)}: {why}")
    twice = [name for name, count in Counter(x for merge in merges for x in merge.layers).items() if count > 1]
    if twice:
        raise ConvpareError(f"{twice[0]!r} is in two merges; merge one, and look for the other in the merged model")


def _structure(merge: Merge) -> tuple[object, ...]:
    """What it changes, whatever the size of the inputs."""
    return merge.layers, merge.norm, merge.biases, merge.k, merge.r


def _prove(model: nn.Module, merges: Sequence[Merge], args: tuple[Tensor, ...]) -> None:
    """Compare both networks in float64, evaluation mode, on noise."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    calls = [noise(Call("", args, {}), torch.Generator().manual_seed(0), device)]
    wide = copy.deepcopy(model).double()
    try:
        expected = outputs_of(wide, calls)
    except RAISED as cause:
        raise ConvpareError(
            f"a merge in {type(model).__name__} cannot be proved: in float64 the model does not run ({cause})"
        ) from cause
    merge_(wide, merges)
    error = compared(expected, lambda: outputs_of(wide, calls))
    if not error <= TOLERANCE:
        names = ", ".join(merge.expansion for merge in merges)
        raise ConvpareError(
            f"the model with {names} merged is another function: relative error {error:.1e} "
            f"(tolerance {TOLERANCE:.0e}). Nothing was changed. Leave the merge out and report the model."
        )


def _absorb(layer: Linear, matrix: Tensor, constant: Tensor, *, biased: bool) -> None:
    old = layer.weight
    weight = old.detach().double()
    new = torch.einsum("ogk...,gkr->ogr...", weight.unflatten(1, matrix.shape[:2]), matrix).flatten(1, 2)
    layer.weight = nn.Parameter(new.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if biased or layer.bias is not None:
        shift = weight.reshape(*weight.shape[:2], -1).sum(2) @ constant
        before = 0 if layer.bias is None else layer.bias.detach().double()
        flag = (layer.bias if layer.bias is not None else old).requires_grad
        layer.bias = nn.Parameter((shift + before).to(old.dtype), requires_grad=flag)
    sync_attributes(layer)
