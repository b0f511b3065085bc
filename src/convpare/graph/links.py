"""What captured parts of a model hand to each other: an output that only later parts read is no end of the network."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from convpare.errors import ConvpareError
from convpare.graph.structure import Call
from convpare.modes import eval_mode

Leaf = tuple[int, int]  # which call, and which of the leaves of its output
Shape = tuple[int, ...]
ROUNDING = 1e-6
PLAIN = (Tensor, int, float, str, type(None))


@dataclass(frozen=True)
class Recording:
    """A run of the model: its inputs, the calls of its parts in their order, what each returned, and the result."""

    args: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    made: tuple[Any, ...]
    result: Any


class Touched(Exception):  # noqa: N818 - a finding
    """Something that is no part used the values of a part's output, or returned it."""

    def __init__(self, leaf: Leaf) -> None:
        super().__init__(f"output {leaf[1]} of part {leaf[0]} is used outside of the parts")
        self.leaf = leaf


class Opaque(Tensor):
    """Stands for a part's output: it has a shape, a type and a device, and nobody may compute with it."""

    leaf: Leaf

    @staticmethod
    def of(like: Tensor, shape: Shape, leaf: Leaf) -> "Opaque":
        made: Opaque = Tensor._make_wrapper_subclass(Opaque, shape, dtype=like.dtype, device=like.device)
        made.leaf = leaf
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise Touched(next(x.leaf for x in tree_leaves((args, kwargs)) if isinstance(x, Opaque)))


def linked(model: nn.Module, recording: Recording) -> tuple[Call, ...]:
    """The calls with their `links` and `inner`: which inputs are outputs of earlier calls, and which of these end so.

    The model runs again with every part replaced by what it returned, tensors that another part was given by such
    that nobody may compute with: what reads more of them than their shape is found, and that output stays an end.
    """
    given = {id(x) for call in recording.calls for x in tree_leaves((call.args, dict(call.kwargs)))}
    candidates = {
        (number, leaf): tuple(x.shape)
        for number, made in enumerate(recording.made)
        for leaf, x in enumerate(tree_leaves(made))
        if isinstance(x, Tensor) and x.is_floating_point() and id(x) in given
    }
    while candidates:
        try:
            links = replayed(model, recording, candidates)
        except Touched as touched:
            del candidates[touched.leaf]
        except ConvpareError:  # what lies between the parts does not run twice alike
            break
        else:
            ends = [frozenset(leaf for n, leaf in candidates if n == number) for number in range(len(links))]
            return tuple(map(_with, recording.calls, links, ends))
    return recording.calls


def _with(call: Call, links: Mapping[int, Leaf], inner: frozenset[int]) -> Call:
    return replace(call, links=links, inner=inner)


def replayed(model: nn.Module, recording: Recording, shapes: Mapping[Leaf, Shape]) -> list[dict[int, Leaf]]:
    """Run what lies between the parts: where each call finds the outputs in `shapes`, which are of these shapes now.

    Raises:
        Touched: one of them is used in another way than for its shape.
        ConvpareError: what lies between the parts does not run with these shapes, or not as recorded.
    """
    stage = _Stage(recording, shapes)
    known = {id(x): x for x in [*model.parameters(), *model.buffers()]}
    between = copy.deepcopy(model, known)
    for name in {call.name for call in recording.calls}:
        between.get_submodule(name).forward = stage.actor(name)
    try:
        with eval_mode(between), torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = between(*recording.args)
    except (Touched, ConvpareError):
        raise
    except Exception as error:  # the user's forward may raise anything
        raise ConvpareError(f"{type(model).__name__} does not run around its parts: {error}") from error
    if len(stage.links) != len(recording.calls):
        raise _other("the number of its calls")
    for got, expected in zip(_same_leaves(result, recording.result), tree_leaves(recording.result), strict=True):
        if isinstance(got, Opaque):
            raise Touched(got.leaf)
        if not _equal(got, expected):
            raise _other("its result")
    return stage.links


class _Stage:
    """Plays the parts of a recorded run."""

    def __init__(self, recording: Recording, shapes: Mapping[Leaf, Shape]) -> None:
        self.recording, self.shapes = recording, shapes
        self.links: list[dict[int, Leaf]] = []

    def actor(self, name: str) -> Any:
        return lambda *args, **kwargs: self.play(name, args, kwargs)

    def play(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        number = len(self.links)
        if number >= len(self.recording.calls) or self.recording.calls[number].name != name:
            raise _other("the order of its calls")
        call = self.recording.calls[number]
        expected = tree_leaves((call.args, dict(call.kwargs)))
        links: dict[int, Leaf] = {}
        for leaf, (x, before) in enumerate(zip(_same_leaves((args, kwargs), expected), expected, strict=True)):
            if isinstance(x, Opaque):
                links[leaf] = x.leaf
            elif not _equal(x, before):
                raise _other(f"what {name} is given")
        self.links.append(links)
        leaves, spec = tree_flatten(self.recording.made[number])
        return tree_unflatten([self._shown(x, (number, leaf)) for leaf, x in enumerate(leaves)], spec)

    def _shown(self, x: Any, leaf: Leaf) -> Any:
        return Opaque.of(x, self.shapes[leaf], leaf) if leaf in self.shapes else x


def _same_leaves(tree: Any, like: Any) -> list[Any]:
    leaves = tree_leaves(tree)
    if len(leaves) != len(tree_leaves(like)):
        raise _other("how many tensors it hands on")
    return leaves


def _equal(x: Any, before: Any) -> bool:
    """Whether two leaves are the same, where that can be told, up to the roundings of operators that order freely."""
    if isinstance(x, Tensor) and isinstance(before, Tensor):
        if x.shape != before.shape or x.dtype != before.dtype:
            return False
        if not x.is_floating_point():
            return torch.equal(x, before)
        return torch.allclose(x, before, rtol=ROUNDING, atol=ROUNDING * _scale(before), equal_nan=True)
    return isinstance(x, PLAIN) and type(x) is type(before) and bool(x == before)


def _scale(x: Tensor) -> float:
    return float(x.abs().nan_to_num().max()) if x.numel() else 0.0


def _other(what: str) -> ConvpareError:
    return ConvpareError(f"run again around its parts, the model changes {what}")


def fed(call: Call, made: Sequence[Sequence[Any]]) -> Call:
    """The call with the leaves that earlier calls returned (`made`, a list of leaves for each) in their places."""
    if not call.links:
        return call
    leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
    for leaf, (number, output) in call.links.items():
        leaves[leaf] = made[number][output]
    args, kwargs = tree_unflatten(leaves, spec)
    return replace(call, args=args, kwargs=kwargs)
