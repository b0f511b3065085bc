"""What each layer could become: chains of two layers across its cuts, what they cost, and what error they add."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.factorize.chain import Layout
from convpare.factorize.edit import kernel_at, layer_of
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
    """The layers that a chain can replace: modules of their own, whose weight is theirs alone; of grouped layers,
    transposed ones are none.
    """
    plain = [x for x in graph.layers if not x.computed and (x.groups == 1 or x.kind == "conv")]
    return [x for x in plain if _is_replaceable(model, x.name)]


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
    """The second moments of what removals leave of a layer, under the mask `keep` (channels,)."""
    into, out = (graph.kept(axis, keep) for axis in (layer.into, layer.out))
    slots = metric.inputs.shape[1] // _taps(metric, graph, layer)
    if graph.is_depthwise(layer):  # whole groups go
        channels = np.unique(out // (graph.shapes[layer.weight][layer.out_axis] // layer.groups))
        left = torch.as_tensor(channels, device=metric.inputs.device)
        return Metric(metric.inputs[left], None if metric.outputs is None else metric.outputs[left])
    outputs = metric.outputs
    if outputs is not None and (mine := out[out < outputs.shape[1]]).size < outputs.shape[1]:  # alike in all groups
        outputs = _picked(outputs, torch.as_tensor(mine, device=outputs.device))
    if len(into) == slots:
        return Metric(metric.inputs, outputs)
    taps = np.arange(_taps(metric, graph, layer))
    chosen = torch.as_tensor((into[:, None] * len(taps) + taps).flatten(), device=metric.inputs.device)
    return Metric(_picked(metric.inputs, chosen), outputs)


def _taps(metric: Metric, graph: Graph, layer: Layer) -> int:
    """Positions of the kernel for each of its inputs, in the moment of what it sees."""
    return metric.inputs.shape[1] // graph.shapes[layer.weight][layer.in_axis]


def _picked(moment: Tensor, chosen: Tensor) -> Tensor:
    return moment[:, chosen][:, :, chosen]


def dense_cost(graph: Graph, layer: Layer) -> tuple[Bilinear, Bilinear]:
    """MACs and parameters of a layer as it is, bias apart."""
    return _bilinear(graph, layer, lambda kernel: (tuple(kernel.tensor.shape),))


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
    if forms is not None and not forms:
        return []
    into, out = (torch.as_tensor(graph.kept(axis, keep), device=weight.device) for axis in (layer.into, layer.out))
    left = weight.detach().double().index_select(layer.in_axis, into).index_select(layer.out_axis, out)
    transposed = layer.kind == "conv_transpose"
    metric = restricted(metric, graph, layer, keep)
    kernel = Kernel.of(left, len(metric.inputs), transposed)
    unit = metric.cost(kernel) if relative else graph.inputs[0][0] / layer.positions
    found = []
    for cut in cuts_of(kernel.dimensions):
        if (transposed and not cut.splits_channels) or (forms is not None and cut.name not in forms):
            continue
        form = TwoFactors(cut)
        worth = form.losses(kernel, transposed, metric).sum(0).cpu().numpy()  # all groups have one rank
        lost = np.concatenate([worth[::-1].cumsum()[::-1][1:], [0.0]]) / max(unit, 1e-300)
        macs, params = _bilinear(graph, layer, partial(form.shapes, ranks=(1,), transposed=transposed))
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


def _times(rank: int, cost: Bilinear) -> Bilinear:
    a, b, c, d = cost
    return rank * a, rank * b, rank * c, rank * d


def _bilinear(graph: Graph, layer: Layer, shapes: Callable[[Kernel], tuple[Shape, ...]]) -> tuple[Bilinear, Bilinear]:
    """The costs of layers whose shapes are bilinear in (inputs, outputs), from those at four sizes.

    Outputs of grouped layers come by the group; depthwise ones have as many groups as outputs, and one input always.
    """
    depthwise, whole = graph.is_depthwise(layer), graph.shapes[layer.weight][layer.out_axis]
    step = whole // layer.groups if depthwise else layer.groups
    sizes = [(1, step), (1 if depthwise else 2, step), (1, 2 * step), (1 if depthwise else 2, 2 * step)]
    transposed = layer.kind == "conv_transpose"
    corners = [Layout(shapes(kernel_at(graph, layer, *own)), transposed) for own in sizes]
    return (
        _through([float(c.macs(layer.extents)) for c in corners], step),
        _through([float(c.params) for c in corners], step),
    )


def _through(corners: list[float], step: int) -> Bilinear:
    """`step`: how many outputs there are at the first corner."""
    one, wide, tall, both = corners
    d = both - wide - tall + one
    b, c = wide - one - d, tall - one - d
    return one - b - c - d, b, c / step, d / step


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
