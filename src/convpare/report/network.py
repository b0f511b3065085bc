"""A network as a report shows it: its layers, what they cost, what was done to them, how they repeat themselves.

Plain data that an artifact can hold, since the original network is not in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from convpare.errors import ConvpareError
from convpare.factorize.edit import Factorize, shape_in
from convpare.factorize.forms import get_form
from convpare.graph.structure import Graph, Group, Layer
from convpare.inspection import Inspection
from convpare.planning.cost import chain_cost, layer_cost
from convpare.planning.plan import Plan, RemoveChannels
from convpare.redundancy.cuts import Spectrum
from convpare.redundancy.kernels import KernelRedundancy
from convpare.report.reading import MALFORMED, count, counts, items, mapping, maybe, real, share, text, texts

POINTS = 40  # of a spectrum that are kept


@dataclass(frozen=True)
class Cuts:
    """The spectrum of a kernel across cuts that are one matrix.

    Attributes:
        names: of the cuts, such as "o|ihw".
        full_rank, rank_99, effective_rank: see `convpare.redundancy.cuts.Spectrum`.
        values: singular values over the largest one, at so many evenly spread ranks from 1 to the full rank.
        chosen: the rank that the plan takes here, if it makes the layer a chain across this cut.
        kept: channels that the plan leaves on the side of the output or input channels, if it removes some there.
    """

    names: tuple[str, ...]
    full_rank: int
    rank_99: int
    effective_rank: float
    values: tuple[float, ...]
    chosen: int | None = None
    kept: int | None = None


@dataclass(frozen=True)
class Chain:
    """What a layer became: the form, its ranks, and the error that the plan predicts."""

    form: str
    ranks: tuple[int, ...]
    error: float | None


@dataclass(frozen=True)
class Sheet:
    """One layer. What was done to it is None where nothing was planned.

    Attributes:
        name, kind: as in the graph; kind is "conv", "conv_transpose" or "linear".
        weight: its shape.
        groups: of a grouped convolution.
        size: of its output in space.
        macs, params: before; `macs_after`, `params_after`: after.
        weight_after: the shape that removals leave.
        chain: what it became, if it was factorized.
        merged: whether the layers after it took it in.
        makes, reads: names of the groups that its outputs and inputs belong to.
        spectra: of its kernel as it was.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    groups: int
    size: tuple[int, ...]
    macs: int
    params: int
    macs_after: int | None = None
    params_after: int | None = None
    weight_after: tuple[int, ...] | None = None
    chain: Chain | None = None
    merged: bool = False
    makes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    spectra: tuple[Cuts, ...] = ()

    @property
    def pruned(self) -> bool:
        """Whether channels were removed from its inputs or outputs."""
        return self.weight_after is not None and self.weight_after != self.weight

    @property
    def left(self) -> float | None:
        """The share of its MACs that is left."""
        return None if self.macs_after is None else self.macs_after / max(self.macs, 1)

    @property
    def redundancy(self) -> float | None:
        """1 - effective rank over full rank, across the cut of the output channels from the rest."""
        first = next((cuts for cuts in self.spectra if any(name.startswith("o|") for name in cuts.names)), None)
        first = first or next(iter(self.spectra), None)
        return None if first is None else min(max(1 - first.effective_rank / max(first.full_rank, 1), 0.0), 1.0)


@dataclass(frozen=True)
class Channels:
    """A group of coupled channels.

    Attributes:
        kept: how many are left; None where nothing was planned.
        error: what the plan says of the removed ones.
        similar: with images, the share of channels whose feature maps resemble another's.
        rank: with images, effective rank of the activations.
        dead: with images, channels of one value.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    kept: int | None = None
    error: float | None = None
    similar: float | None = None
    rank: float | None = None
    dead: int | None = None


@dataclass(frozen=True)
class BlockRatio:
    """K channels leave a block, made from R; `trained_rank` is that of the trained weight."""

    name: str
    k: int
    r: int
    trained_rank: int | None
    after: str


@dataclass(frozen=True)
class Network:
    """Layers in the order of execution, groups, blocks, and channels that stay: (layer, how many, why)."""

    layers: tuple[Sheet, ...]
    groups: tuple[Channels, ...] = ()
    blocks: tuple[BlockRatio, ...] = ()
    frozen: tuple[tuple[str, int, str], ...] = ()
    energy: float = field(default=0.99)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: object) -> "Network":
        """What `to_json` wrote.

        Raises:
            ConvpareError: something is missing or of another kind.
        """
        try:
            return _network(mapping(data))
        except MALFORMED as error:
            raise ConvpareError(
                f"the network that is stored cannot be read ({type(error).__name__}: {str(error)[:100]}); give the "
                "original with --teacher, or compress again"
            ) from error


def network_of(found: Inspection, plan: Plan | None = None, merged: Graph | None = None) -> Network:
    """The network of an inspection, with what a plan makes of it.

    Args:
        found: of the original network, in the plan's form.
        merged: with a plan that merges: the trace of the network with the merges done.

    Raises:
        ConvpareError: the plan was made for another network.
    """
    graph = found.graph
    after = None if plan is None else _After(graph if merged is None else merged, plan)
    sheets = tuple(_sheet(found, layer, after) for layer in graph.layers)
    groups = tuple(_channels(found, group, after) for group in graph.groups)
    blocks = tuple(BlockRatio(b.name, b.k, b.r, b.trained_rank, b.after) for b in found.blocks or ())
    frozen = tuple((row.layer, row.channels, row.reason) for row in graph.frozen)
    return Network(sheets, groups, blocks, frozen, found.energy)


class _After:
    """What a plan leaves of layers and groups."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.graph, self.keep = graph, plan.keep(graph)
        self.layers = {layer.name: layer for layer in graph.layers}
        self.chains = {edit.layer: edit for edit in plan.factorizations}
        self.edits: Mapping[str, RemoveChannels] = {edit.group: edit for edit in plan.edits}

    def sheet(self, layer: Layer) -> dict[str, Any]:
        """The fields of a sheet that say what was done."""
        if layer.name not in self.layers:
            return {"macs_after": 0, "params_after": 0, "merged": True}
        layer, edit = self.layers[layer.name], self.chains.get(layer.name)
        cost = layer_cost(self.graph, layer, self.keep)
        if edit is not None:
            cost = chain_cost(self.graph, layer, self.keep, edit.form, edit.ranks)
        return {
            "macs_after": cost.macs, "params_after": cost.params, "weight_after": self._shape(layer),
            "chain": None if edit is None else Chain(edit.form, edit.ranks, edit.error),
        }  # fmt: skip

    def marks(self, layer: Layer) -> tuple[dict[str, int], dict[str, int]]:
        """By cut, the rank that was chosen; by "o" and "i", the channels that are left where some went."""
        if layer.name not in self.layers:
            return {}, {}
        layer = self.layers[layer.name]
        whole, left = self.graph.shapes[layer.weight], self._shape(layer)
        sides = {"o": layer.out_axis, "i": layer.in_axis} if layer.groups == 1 else {}
        kept = {side: left[axis] for side, axis in sides.items() if left[axis] < whole[axis]}
        edit = self.chains.get(layer.name)
        return ({} if edit is None else self._ranks(layer, edit)), kept

    def _ranks(self, layer: Layer, edit: Factorize) -> dict[str, int]:
        kernel = shape_in(self.graph, layer, self.keep)
        cuts = get_form(edit.form).cuts(kernel)
        if len(cuts) != len(edit.ranks):
            return {}
        blocks = [kernel.groups if cut.splits_channels else 1 for cut in cuts]
        return {cut.name: rank * n for cut, rank, n in zip(cuts, edit.ranks, blocks, strict=True)}

    def _shape(self, layer: Layer) -> tuple[int, ...]:
        axes = range(len(self.graph.shapes[layer.weight]))
        return tuple(len(self.graph.kept((layer.weight, axis), self.keep)) for axis in axes)


def _sheet(found: Inspection, layer: Layer, after: _After | None) -> Sheet:
    graph, cost = found.graph, found.count.layers[layer.name]
    marks: tuple[dict[str, int], dict[str, int]] = ({}, {}) if after is None else after.marks(layer)
    return Sheet(
        name=layer.name,
        kind=layer.kind,
        weight=tuple(graph.shapes[layer.weight]),
        groups=layer.groups,
        size=tuple(layer.extents[0].out) if layer.extents else (),
        macs=cost.macs,
        params=cost.params,
        makes=tuple(g.name for g in graph.groups if layer.name in g.producers),
        reads=tuple(g.name for g in graph.groups if layer.name in g.consumers),
        spectra=tuple(_spectra(found.kernels.get(layer.name), *marks)),
        **({} if after is None else after.sheet(layer)),
    )


def _spectra(kernel: KernelRedundancy | None, chosen: dict[str, int], kept: dict[str, int]) -> Iterator[Cuts]:
    """One for each matrix; those of rank 1 say nothing."""
    matrices: dict[int, list[Spectrum]] = {}
    for spectrum in () if kernel is None else kernel.spectra.values():
        if spectrum.full_rank > 1:
            matrices.setdefault(id(spectrum.values), []).append(spectrum)
    for same in matrices.values():
        first, names = same[0], tuple(spectrum.cut.name for spectrum in same)
        alone = next((side for name in names for side in name.split("|") if side in kept), None)
        yield Cuts(
            names, first.full_rank, first.rank_at(0.99), round(first.effective_rank, 2), _sampled(first),
            next((chosen[name] for name in names if name in chosen), None), None if alone is None else kept[alone],
        )  # fmt: skip


def _sampled(spectrum: Spectrum) -> tuple[float, ...]:
    values = spectrum.values.numpy()
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), POINTS)).round().astype(int))
    return tuple(round(float(value), 4) for value in values[at] / (values[0] or 1.0))


def _channels(found: Inspection, group: Group, after: _After | None) -> Channels:
    edit = None if after is None else after.edits.get(group.name)
    similar, rank, dead = None, None, None
    if found.activations is not None:
        seen = found.activations[group.name]
        similar, rank, dead = found.similar(group.name), seen.ranks.effective_rank, len(seen.dead)
    left = None if after is None else group.channels if edit is None else len(edit.keep)
    error = None if edit is None else edit.error
    return Channels(
        group.name, group.channels, group.producers, group.consumers, left, error, similar, rank, dead
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ reading


def _network(data: dict[str, Any]) -> Network:
    sheets = tuple(_read_sheet(mapping(sheet)) for sheet in items(data["layers"]))
    if len({after is None for sheet in sheets for after in (sheet.macs_after, sheet.params_after)}) > 1:
        raise ValueError("what was done is said of some layers only")
    return Network(
        sheets,
        tuple(_read_channels(mapping(group)) for group in items(data["groups"])),
        tuple(_read_block(mapping(block)) for block in items(data["blocks"])),
        tuple((text(layer), count(channels), text(why)) for layer, channels, why in items(data["frozen"])),
        share(data["energy"]),
    )


def _read_sheet(data: dict[str, Any]) -> Sheet:
    chain = data["chain"]
    return Sheet(
        text(data["name"]), text(data["kind"]), counts(data["weight"]), count(data["groups"]),
        counts(data["size"]), count(data["macs"]), count(data["params"]), maybe(count, data["macs_after"]),
        maybe(count, data["params_after"]), maybe(counts, data["weight_after"]),
        None if chain is None else Chain(text(chain["form"]), counts(chain["ranks"]), maybe(real, chain["error"])),
        data["merged"] is True, texts(data["makes"]), texts(data["reads"]),
        tuple(_read_cuts(mapping(cuts)) for cuts in items(data["spectra"])),
    )  # fmt: skip


def _read_cuts(data: dict[str, Any]) -> Cuts:
    values = tuple(share(value) for value in items(data["values"]))
    names = texts(data["names"])
    if not names or not values or len(values) > POINTS:
        raise ValueError(f"{len(values)} points of a spectrum across {len(names)} cuts")
    full, rank = (count(data[key]) for key in ("full_rank", "rank_99"))
    chosen, kept = (maybe(count, data[key]) for key in ("chosen", "kept"))
    return Cuts(names, full, rank, real(data["effective_rank"]), values, chosen, kept)


def _read_channels(data: dict[str, Any]) -> Channels:
    error, similar, rank = (maybe(real, data[key]) for key in ("error", "similar", "rank"))
    dead = maybe(count, data["dead"])
    if len({measured is None for measured in (similar, rank, dead)}) > 1:
        raise ValueError("of the maps of a group all is measured, or nothing")
    return Channels(
        text(data["name"]), count(data["channels"]), texts(data["producers"]), texts(data["consumers"]),
        maybe(count, data["kept"]), error, similar, rank, dead,
    )  # fmt: skip


def _read_block(data: dict[str, Any]) -> BlockRatio:
    rank = maybe(count, data["trained_rank"])
    return BlockRatio(text(data["name"]), count(data["k"]), count(data["r"]), rank, text(data["after"]))
