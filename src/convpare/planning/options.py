"""What each layer could become: chains of two layers across its cuts, what they cost, and what error they add."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.factorize.chain import Layout
from convpare.factorize.edit import layer_of, shape_in
from convpare.factorize.forms import Shape
from convpare.factorize.metric import Metric
from convpare.factorize.two_factors import TwoFactors
from convpare.graph.structure import Graph, Layer
from convpare.redundancy.cuts import Kernel, cuts_of
from convpare.redundancy.moments import Moments, that_run

RANKS = 32  # of a form, about so many are tried

Bilinear = tuple[float, float, float, float]
"""a, b, c, d of a cost a + b·I + c·O + d·I·O of a layer's I inputs and O outputs."""


@dataclass(frozen=True)
class Chain:
    """A form of a layer at a rank: its MACs and parameters, biases apart, and the error that it adds."""

    form: str
    rank: int
    macs: Bilinear
    params: Bilinear
    error: float


def factorizable(model: nn.Module, graph: Graph) -> list[Layer]:
    """The layers that a chain can replace: modules of their own, not grouped, whose weight is theirs alone."""
    return [x for x in graph.layers if x.groups == 1 and not x.computed and _is_replaceable(model, x.name)]


def _is_replaceable(model: nn.Module, name: str) -> bool:
    try:
        layer_of(model, name)
    except ConvpareError:
        return False
    return True


def metrics_of(moments: Moments, layers: Sequence[Layer], weighted: bool) -> dict[str, Metric]:
    """The second moments of whole layers, with `weighted` those of their outputs, too.

    None of layers too wide for it (see `Sampling`), nor of those that do not run as modules (their owner reads their
    weight itself).
    """
    layers = that_run(moments.model, layers, moments.images[:1])
    inputs, outputs = moments.both(layers) if weighted else (moments.inputs(layers), {})
    return {name: Metric(moment, outputs.get(name)) for name, moment in inputs.items() if moment.ndim == 3}


def restricted(metric: Metric, graph: Graph, layer: Layer, keep: np.ndarray) -> Metric:
    """The second moments of what removals leave of a layer that is not grouped, under the mask `keep` (channels,)."""
    device = metric.inputs.device
    into, out = (torch.as_tensor(graph.kept(axis, keep), device=device) for axis in (layer.into, layer.out))
    if (len(out), len(into)) == tuple(graph.shapes[layer.weight][a] for a in (layer.out_axis, layer.in_axis)):
        return Metric(metric.inputs, metric.outputs)
    taps = metric.inputs.shape[1] // graph.shapes[layer.weight][layer.in_axis]
    chosen = (into[:, None] * taps + torch.arange(taps, device=device)).flatten()
    outputs = None if metric.outputs is None else metric.outputs[:, out][:, :, out]
    return Metric(metric.inputs[:, chosen][:, :, chosen], outputs)


def dense_cost(graph: Graph, layer: Layer) -> tuple[Bilinear, Bilinear]:
    """MACs and parameters of a layer as it is, bias apart."""
    spatial = shape_in(graph, layer, graph.keep_all()).tensor.shape[3:]
    return _bilinear(layer, lambda sizes: ((1, sizes[1], sizes[0], *spatial),))


def chains_of(
    graph: Graph, layer: Layer, weight: Tensor, metric: Metric, keep: np.ndarray, relative: bool,
    times: Callable[[Layer, tuple[str, tuple[int, ...]] | None, int, int], float] | None = None,
    forms: Collection[str] | None = None,
) -> list[Chain]:  # fmt: skip
    """The chains of a layer under the mask `keep` (channels,) with fewer MACs than it, those with the fewest last.

    Of two the worse in error and in all costs is left out; with times, what is no faster than the layer, too.

    Args:
        weight: of the whole layer.
        metric: of the whole layer.
        relative: errors are shares of the layer's own output, else of the network's (see `output_moments`).
        times: milliseconds of the layer or a chain of it, see `NetworkTimes.of`.
        forms: those of interest; None for all.
    """
    into, out = (torch.as_tensor(graph.kept(axis, keep), device=weight.device) for axis in (layer.into, layer.out))
    left = weight.detach().double().index_select(layer.in_axis, into).index_select(layer.out_axis, out)
    transposed = layer.kind == "conv_transpose"
    kernel, metric = Kernel.of(left, 1, transposed), restricted(metric, graph, layer, keep)
    unit = metric.cost(kernel) if relative else graph.inputs[0][0] / layer.positions
    found = []
    for cut in cuts_of(kernel.dimensions):
        if (transposed and not cut.splits_channels) or (forms is not None and cut.name not in forms):
            continue
        form = TwoFactors(cut)
        worth = form.losses(kernel, transposed, metric)[0].cpu().numpy()
        lost = np.concatenate([worth[::-1].cumsum()[::-1][1:], [0.0]]) / max(unit, 1e-300)
        macs, params = _bilinear(layer, partial(_shapes, kernel, form, transposed))
        for rank in _ranks(len(worth)):
            found.append(Chain(cut.name, rank, _times(rank, macs), _times(rank, params), float(lost[rank - 1])))
    sizes = len(into), len(out)
    whole = value(dense_cost(graph, layer)[0], *sizes)
    slowest = times(layer, None, *sizes) if times else 0.0
    spent = [
        (value(c.macs, *sizes), value(c.params, *sizes),
         times(layer, (c.form, (c.rank,)), *sizes) if times else 0.0)
        for c in found
    ]  # fmt: skip
    kept = [n for n, (macs, _, taken) in enumerate(spent) if macs < whole and (not times or taken < slowest)]
    return _front([found[n] for n in kept], [spent[n] for n in kept])


def value(cost: Bilinear, into: float, out: float) -> float:
    """Of a bilinear cost, for so many inputs and outputs."""
    return cost[0] + cost[1] * into + cost[2] * out + cost[3] * into * out


def _ranks(full: int) -> list[int]:
    """All, or about `RANKS` of them, denser where they are small; and multiples of 16, which machines like."""
    if full <= RANKS:
        return list(range(1, full + 1))
    spread = {round(r) for r in np.geomspace(1, full, RANKS)} | {round(r) for r in np.linspace(1, full, RANKS)}
    return sorted(spread | set(range(16, min(full, 16 * RANKS) + 1, 16)))


def _shapes(kernel: Kernel, form: TwoFactors, transposed: bool, sizes: tuple[int, int]) -> tuple[Shape, ...]:
    """At rank 1: both layers of a chain grow with the rank alike."""
    resized = Kernel(torch.empty(1, sizes[1], sizes[0], *kernel.tensor.shape[3:], device="meta"))
    return form.shapes(resized, (1,), transposed)


def _times(rank: int, cost: Bilinear) -> Bilinear:
    a, b, c, d = cost
    return rank * a, rank * b, rank * c, rank * d


def _bilinear(layer: Layer, shapes: Callable[[tuple[int, int]], tuple[Shape, ...]]) -> tuple[Bilinear, Bilinear]:
    """The costs of layers whose shapes are bilinear in (inputs, outputs), from those at four sizes."""
    corners = [Layout(shapes(sizes), layer.kind == "conv_transpose") for sizes in ((1, 1), (2, 1), (1, 2), (2, 2))]
    return (
        _through([float(c.macs(layer.extents)) for c in corners]),
        _through([float(c.params) for c in corners]),
    )


def _through(corners: list[float]) -> Bilinear:
    one, wide, tall, both = corners
    d = both - wide - tall + one
    b, c = wide - one - d, tall - one - d
    return one - b - c - d, b, c, d


def _front(found: list[Chain], costs: Sequence[tuple[float, ...]]) -> list[Chain]:
    """Those that no other beats in all costs and error, the first cost's most expensive first."""
    if not found:
        return []
    table = np.array([(*cost, chain.error) for chain, cost in zip(found, costs, strict=True)])
    order = np.lexsort(table.T[::-1])
    front: list[int] = []
    for i in order:  # what beats a chain comes before it
        if not (table[front] <= table[i]).all(1).any():
            front.append(int(i))
    return [found[i] for i in front[::-1]]
