"""The K/R ratio of a network's blocks: how many channels leave a block for each rank of the map that makes them.

Source: Huang, Si, Zheng, Li (arXiv 2112.04857). A block's kernel, stacked over its K output channels, has rank R along
them. With nothing nonlinear after it the next linear map absorbs the expansion from R to K, so that K drops out of the
model (`convpare.graph.merging` does that); with a nonlinearity after it K/R is a graded sign of redundancy. The paper's
blocks are read off the captured graph here, by rules of our own:

- A *block* is a chain of convolutions and linear layers that read nothing but each other, with only what keeps channels
  and positions between them: normalisation, activation, dropout, gates. Sums, concatenations, pooling and values that
  several layers read (but for parallel ones whose outputs are concatenated) are the *stream*, at which blocks end.
- Within a chain a block has one spatial kernel (a convolution with k > 1, or several that follow each other with
  nothing nonlinear between: one kernel in factors), at most one run of pointwise maps that leads to it, and those that
  follow it. A pointwise map that stands between two spatial ones ends the block of the first if that is depthwise, or
  linear between them; else it leads to the second. Two pointwise maps after a spatial one with nothing nonlinear
  between belong to two blocks, the first being the narrow end of its own.
- A block that ends in a pointwise map has R = the channels that enter that map, over all of its groups. One that ends
  in a spatial convolution has R = min(K, C·k²), C being all channels that enter: a K/R of 1 unless K > C·k².
- A lone pointwise map that reads the stream is no block: it maps stream to stream (the projection on a shortcut, a
  transition, a classifier that is a convolution). Nor are the layers of a gate (squeeze-and-excitation), nor linear
  layers that make the model's output (classification heads): their K is not a choice of design.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from convpare.graph.capture import Inputs, as_args, capture
from convpare.graph.flow import Flow, LinearMap, Link
from convpare.graph.merging import mergeable_in

STREAM = "stream"


@dataclass(frozen=True)
class Map:
    """A pointwise map within a block, from `r` channels to `k`; `before`, `after` and `removable` as in `Block`."""

    layer: str
    k: int
    r: int
    before: str
    after: str
    removable: bool

    @property
    def k_over_r(self) -> float:
        return self.k / self.r

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"k_over_r": self.k_over_r}


@dataclass(frozen=True)
class Block:
    """A block of a network and the rank of what it makes.

    Attributes:
        name: the longest module path that its layers have in common; its last layer's name where there is none, or
            where another block has the same.
        layers: its convolutions and linear layers in the order of execution. Parallel ones that read the same layer
            (the two expansions of a SqueezeNet fire) are blocks of their own, which share that layer.
        k: channels that leave it.
        r: the rank along them: see the module's description.
        before: what stands between the linear map before its last layer and that layer: "nothing"; "affine" (batch norm
            with fixed statistics, a scale); the names of the other operators in their order ("gate": a product with
            what is computed from the value itself); or "stream" where the last layer reads the stream.
        after: the same between its last layer and the next linear map in the order of execution (or the network's end);
            operators where branches join ("add", "cat") are named, too.
        removable: whether the last layer is an expansion that the layers after it absorb exactly
            (`convpare.graph.merging`).
        inner: its pointwise maps but the last layer.
        trained_rank: the numerical rank of the last layer's trained weight along its output channels, where the caller
            has measured and filled it in.
    """

    name: str
    layers: tuple[str, ...]
    k: int
    r: int
    before: str
    after: str
    removable: bool
    inner: tuple[Map, ...] = ()
    trained_rank: int | None = None

    @property
    def k_over_r(self) -> float:
        return self.k / self.r

    @property
    def mergeable(self) -> tuple[str, ...]:
        """Its layers that the layers after them absorb exactly."""
        inner = tuple(map.layer for map in self.inner if map.removable)
        return (*inner, self.layers[-1]) if self.removable else inner

    def to_json(self) -> dict[str, Any]:
        inner = [map.to_json() for map in self.inner]
        return asdict(self) | {"k_over_r": self.k_over_r, "layers": list(self.layers), "inner": inner}


def kr_blocks(model: nn.Module, example_inputs: Inputs, program: ExportedProgram | None = None) -> list[Block]:
    """The blocks of `model` in the order in which they end, each with its K, R, and what stands around its last layer.

    The model is captured in evaluation mode and not changed. Weights are read only to tell whether an expansion can be
    merged exactly (`removable`). `program` is the model as `capture` gave it, if it is at hand.

    Raises:
        ConvpareError: the model does not run on these inputs, or its forward cannot be captured.
    """
    program = capture(model, as_args(example_inputs)) if program is None else program
    flow = Flow(model, program)
    merges, _ = mergeable_in(flow)
    chains = _Chains(flow)
    return _named([_block(chains, chain, merges) for chain in chains.blocks()])


class _Chains:
    """The linear maps of a network linked to chains, and the chains cut into blocks."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.maps = [map for node, map in flow.maps.items() if node not in flow.gating]
        self.links = {map: link for map in self.maps if (link := flow.link(map)) is not None}
        self.before_spatial = {link.source for map, link in self.links.items() if not map.is_pointwise}

    def blocks(self) -> list[tuple[LinearMap, ...]]:
        until: dict[LinearMap, tuple[LinearMap, ...]] = {}  # map → its block up to itself
        continued = set()
        for map in self.maps:
            link = self.links.get(map)
            until[map] = (map,)
            if link is not None and self._belongs(map, link, until[link.source]):
                until[map] = (*until[link.source], map)
                continued.add(link.source)
        return [chain for map, chain in until.items() if map not in continued and self._is_block(chain)]

    def _belongs(self, map: LinearMap, link: Link, chain: Sequence[LinearMap]) -> bool:
        """Whether `map` goes on with the block `chain`, or starts one."""
        has_kernel = any(not m.is_pointwise for m in chain)
        if not map.is_pointwise:
            return not has_kernel or (not link.source.is_pointwise and link.is_affine)
        leads_on = map in self.before_spatial
        if link.source.is_pointwise:
            return not has_kernel or not (link.is_affine or leads_on)
        return link.is_affine or link.source.is_depthwise or not leads_on

    def _is_block(self, chain: Sequence[LinearMap]) -> bool:
        last = chain[-1]
        lone = len(chain) == 1 and last.is_pointwise and last not in self.links
        head = all(map.kind == "linear" for map in chain) and self.flow.makes_output(last)
        return not lone and not head


def _block(chains: _Chains, chain: Sequence[LinearMap], merges: Mapping[str, object]) -> Block:
    *inner, last = chain
    maps = tuple(_described(chains, map, merges) for map in inner if map.is_pointwise)
    end = _described(chains, last, merges)
    names = tuple(map.name for map in chain)
    return Block(_prefix(names), names, end.k, end.r, end.before, end.after, end.removable, maps)


def _described(chains: _Chains, map: LinearMap, merges: Mapping[str, object]) -> Map:
    link = chains.links.get(map)
    before = link.between if link is not None else STREAM
    return Map(map.name, map.k, map.rank, before, chains.flow.after(map), map.name in merges)


def _prefix(names: Sequence[str]) -> str:
    """The module path that all names have in common; the last name where there is none."""
    common = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or names[-1]


def _named(blocks: Sequence[Block]) -> list[Block]:
    count = Counter(block.name for block in blocks)
    return [replace(block, name=block.layers[-1]) if count[block.name] > 1 else block for block in blocks]
