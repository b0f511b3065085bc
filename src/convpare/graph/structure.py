"""What a trace yields: the coupled channels of a network as plain data, and what they cost."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import fx, nn
from torch.export import ExportedProgram

from convpare.errors import ConvpareError
from convpare.graph.memory import Memory
from convpare.graph.units import staying

Axis = tuple[str, int]
"""A parameter or buffer (its name in the model) and one of its dimensions."""

Form = Literal["module", "graph", "linked"]
FORMS: tuple[Form, ...] = ("module", "graph", "linked")
"""What surgery works on: the eager module, or the captured graph with the numbers in it rewritten."""

Mender = Callable[[nn.Module, np.ndarray], None]
"""Mends a module's numbers: takes the module and the mask of its output channels that stay, shape (channels,)."""


@dataclass(frozen=True)
class Extent:
    """One call of a layer: how often it runs side by side (the batch), and the spatial sizes of input and output."""

    batch: int
    into: tuple[int, ...]
    out: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer. Its weight keeps PyTorch's layout, so MACs = positions · numel(weight)."""

    name: str
    kind: str  # "conv", "conv_transpose" or "linear"
    weight: str
    bias: str | None
    out_axis: int
    in_axis: int
    extents: tuple[Extent, ...]  # its calls for the example inputs
    groups: int
    computed: bool = False  # the weight is a function of the parameter (standardised, reparametrised)

    @property
    def positions(self) -> int:
        """How often the whole kernel is applied for the example inputs, all calls and the batch included."""
        transposed = self.kind == "conv_transpose"
        return sum(e.batch * math.prod(e.into if transposed else e.out) for e in self.extents)

    @property
    def outputs(self) -> int:
        """Output elements per output channel, likewise."""
        return sum(e.batch * math.prod(e.out) for e in self.extents)

    @property
    def out(self) -> Axis:
        return self.weight, self.out_axis

    @property
    def into(self) -> Axis:
        return self.weight, self.in_axis


@dataclass(frozen=True)
class Group:
    """Channels that may go one by one, each with everything that is coupled to it; all of one kind.

    `units` is the range of the group's channels in the graph's numbering of all removable channels.
    """

    name: str
    start: int
    channels: int
    producers: tuple[str, ...]  # layers whose output channels these are, in the order of execution
    consumers: tuple[str, ...]  # layers that read them
    inexact: str | None = None  # why the function of the other channels changes by nature when some of these go

    @property
    def units(self) -> slice:
        return slice(self.start, self.start + self.channels)

    @property
    def least(self) -> int:
        """How many channels must stay: one, and two where others count them, since one alone has no variance."""
        return min(2 if self.inexact else 1, self.channels)


@dataclass(frozen=True)
class Frozen:
    """Output channels of a layer that must stay, and why."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Count:
    """A number that counts channels: `sign` times how many of `units` stay (-1 always does), plus `offset`."""

    units: np.ndarray
    sign: int = 1
    offset: int = 0

    def __call__(self, keep: np.ndarray) -> int:
        return self.sign * int(staying(self.units, keep).sum()) + self.offset

    def negative(self) -> "Count":
        return Count(self.units, -self.sign, -self.offset)


@dataclass(frozen=True)
class Mend:
    """A module with a number in its forward that its mender keeps true; `units` of its channels, -1 where fixed."""

    module: str
    units: np.ndarray
    mender: Mender


@dataclass(frozen=True)
class Attribute:
    """A module's attribute from which its forward takes numbers of channels: an integer, or a list of integers."""

    module: str
    name: str
    counts: Count | tuple[Count | int, ...]

    def __call__(self, keep: np.ndarray) -> int | tuple[int, ...]:
        """Its value under the mask `keep` (channels,)."""
        if isinstance(self.counts, Count):
            return self.counts(keep)
        return tuple(c(keep) if isinstance(c, Count) else c for c in self.counts)


Path = tuple[int | str, ...]
"""Where a number stands in the arguments of a node: `(1, 2)` is `args[1][2]`, `("dim",)` is `kwargs["dim"]`."""


@dataclass(frozen=True)
class Rewrite:
    """A number in the arguments of a node of the captured graph, and what it counts."""

    node: str
    path: Path
    count: Count


@dataclass(frozen=True)
class Shuffle:
    """A tensor of positions of the captured graph that picks from channels: `units` of what it picks from."""

    node: str
    units: np.ndarray
    positions: np.ndarray

    def __call__(self, keep: np.ndarray) -> np.ndarray:
        """The positions under the mask `keep` (channels,)."""
        stays = staying(self.units, keep)
        return np.asarray((np.cumsum(stays) - 1)[self.positions[stays[self.positions]]])


@dataclass(frozen=True)
class Call:
    """A call of a submodule; "" is the whole model.

    `links`: which leaf of the arguments is which leaf of the output of which earlier call. `inner`: the leaves of this
    call's output that only later calls read.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    links: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    inner: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Graph:
    """The structure of a network: groups of coupled channels, layers, and what is frozen and why.

    `units` says for every axis of every parameter and buffer which removable channel (unit) each index belongs to,
    -1 where it stays. A unit is removed everywhere or nowhere; units are numbered group by group.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    shapes: Mapping[str, tuple[int, ...]]  # of parameters and buffers, by name
    parameters: frozenset[str]
    aliases: Mapping[str, str]  # other names of tied parameters → the name used here
    units: Mapping[Axis, np.ndarray]
    groups: tuple[Group, ...]
    layers: tuple[Layer, ...]
    frozen: tuple[Frozen, ...]
    mends: tuple[Mend, ...]
    attributes: tuple[Attribute, ...]
    rewrites: tuple[Rewrite, ...]
    shuffles: tuple[Shuffle, ...]
    spared: frozenset[Axis]  # what the zeroed network keeps, lest it divides by zero
    not_counted: Mapping[str, int]  # operator → how often it runs, of those that multiply and are not in `layers`
    unreached: tuple[str, ...]  # modules with parameters that the forward does not use in evaluation mode
    parts: tuple[Call, ...] = field(default=(), repr=False, compare=False)  # what was captured, if not the whole
    form: Form = "module"
    program: ExportedProgram | None = field(default=None, repr=False, compare=False)  # of the graph form
    memory: Memory | None = field(default=None, repr=False, compare=False)  # of the tensors, if captured as a whole
    batched: frozenset[tuple[str, Path]] = field(default=frozenset(), repr=False, compare=False)  # follow the batch
    folded: Mapping[str, fx.Graph] = field(
        default_factory=dict, repr=False, compare=False
    )  # parameter → computed weight

    @property
    def channels(self) -> int:
        """The number of all removable channels."""
        return sum(g.channels for g in self.groups)

    def layer(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ConvpareError(f"no layer {name!r} in {self.model}; its layers are {_some(x.name for x in self.layers)}")

    def group(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise ConvpareError(f"no group {name!r} in {self.model}; its groups are {_some(g.name for g in self.groups)}")

    def keep_all(self) -> np.ndarray:
        """The mask that keeps every removable channel, shape (channels,)."""
        return np.ones(self.channels, bool)

    def is_depthwise(self, layer: Layer) -> bool:
        """Whether each group of this convolution reads one channel, so that its channels go group by group."""
        return layer.groups > 1 and 1 in (self.shapes[layer.weight][0], self.shapes[layer.weight][1])

    def is_inner(self, group: Group) -> bool:
        """Whether one layer alone makes these channels (depthwise ones after it pass them on): no residual stream."""
        return sum(not self.is_depthwise(self.layer(name)) for name in group.producers) == 1

    def channel_units(self, layer: Layer, *, reads_input: bool) -> np.ndarray:
        """The removable channel at each channel of a layer's input or output, shape (channels,), -1 where none."""
        axis = layer.into if reads_input else layer.out
        slots = self.units.get(axis, np.full(self.shapes[layer.weight][axis[1]], -1))
        if layer.groups == 1:
            return slots
        shared = reads_input != (layer.kind == "conv_transpose")
        if self.is_depthwise(layer):
            borne = self.units.get((layer.weight, 0), np.full(self.shapes[layer.weight][0], -1))
            return borne[:: len(borne) // layer.groups] if shared else borne
        return np.tile(slots, layer.groups) if shared else slots

    def kept(self, axis: Axis, keep: np.ndarray) -> np.ndarray:
        """The indices of `axis` that stay under the mask `keep` (channels,)."""
        units = self.units.get(axis)
        if units is None:
            return np.arange(self.shapes[axis[0]][axis[1]])
        return np.flatnonzero((units < 0) | keep[units])

    def to_json(self) -> dict[str, object]:
        return {
            "model": self.model,
            "form": self.form,
            "inputs": [list(shape) for shape in self.inputs],
            "layers": [{"name": x.name, "kind": x.kind, "weight": list(self.shapes[x.weight])} for x in self.layers],
            "groups": [
                {
                    "name": g.name,
                    "channels": g.channels,
                    "producers": list(g.producers),
                    "consumers": list(g.consumers),
                    "inexact": g.inexact,
                }
                for g in self.groups
            ],
            "frozen": [{"layer": f.layer, "channels": f.channels, "reason": f.reason} for f in self.frozen],
            "not_counted": dict(self.not_counted),
            "unreached": list(self.unreached),
            "parts": list(dict.fromkeys(call.name for call in self.parts)),
        }


def _some(names: Iterable[str], limit: int = 8) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", … ({len(listed)} in all)" if len(listed) > limit else "")
