"""Where things stand in the drawings of a report: numbers and paths. The template writes the SVG around them."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from convpare.report.gather import Check, Cloud, Clouds, Curve
from convpare.report.network import BlockRatio, Cuts, Sheet

SIDES = (40.0, 104.0)  # pixels of the largest tile, at least and at most
WIDTH = 880.0  # pixels that the widest row takes, if the largest tile allows
SPECTRUM = (168.0, 76.0)
CURVE = (440.0, 250.0)
PANEL = (300.0, 210.0)
SCALE = (-17, 0)  # powers of ten of the self-check's axis
SHADES = 6  # of redundancy, and of depth


@dataclass(frozen=True)
class Tile:
    """A layer on the map.

    Attributes:
        number: of the layer, from 0.
        side: pixels; its square is proportional to the MACs before, down to what can still be seen.
        left: the side of what is left, as a share of `side`.
        done: "same", "removed", "chain", "both" or "merged"; "unplanned" where nothing was planned.
        shade: of its redundancy, from 0 to SHADES - 1; None where that is not known.
    """

    number: int
    sheet: Sheet
    side: float
    left: float
    done: str
    shade: int | None


@dataclass(frozen=True)
class Row:
    """Layers that follow each other with outputs of one size."""

    size: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Axis:
    """Ticks as (place, label)."""

    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class SpectrumPlot:
    """A falling area, and where the marks stand, None outside."""

    area: str
    rank_99: float
    chosen: float | None
    kept: float | None


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    label: str
    shade: int = 0


@dataclass(frozen=True)
class Plot:
    """A line with dots in a frame from `left` to `right` and `top` to `bottom`."""

    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis
    lines: tuple[str, ...]
    dots: tuple[Dot, ...]
    chosen: Dot | None = None


@dataclass(frozen=True)
class Alike:
    """Blocks that follow each other and are alike; `share` is their K/R over the largest one."""

    name: str
    k: int
    r: int
    ratio: float
    share: float
    ranks: str
    after: str


def map_rows(sheets: Sequence[Sheet]) -> list[Row]:
    """The layers in the order of execution, a row for each run of one output size.

    Layers of one position, such as gates, stand in the row that they interrupt; those at the end have one of their own.
    """
    largest = max((sheet.macs for sheet in sheets), default=1) or 1
    rows = _rows([_tile(number, sheet, largest) for number, sheet in enumerate(sheets)])
    widest = max((sum(tile.side for tile in row.tiles) for row in rows), default=1.0)
    side = min(max(WIDTH / widest, SIDES[0]), SIDES[1])
    return [replace(row, tiles=tuple(replace(t, side=max(side * t.side, 5.0)) for t in row.tiles)) for row in rows]


def _rows(tiles: Sequence[Tile]) -> list[Row]:
    last = max((tile.number for tile in tiles if math.prod(tile.sheet.size) > 1), default=-1)
    rows: list[tuple[tuple[int, ...], list[Tile]]] = []
    for tile in tiles:
        size, inside = tile.sheet.size, tile.number < last and rows
        single = math.prod(size) <= 1
        if rows and (rows[-1][0] == size or (single and (inside or math.prod(rows[-1][0]) <= 1))):
            rows[-1][1].append(tile)
        else:
            rows.append((size, [tile]))
    return [Row("×".join(map(str, size)) if math.prod(size) > 1 else "1×1", tuple(row)) for size, row in rows]


def _tile(number: int, sheet: Sheet, largest: int) -> Tile:
    left = 1.0 if sheet.left is None else math.sqrt(min(max(sheet.left, 0.0), 1.0))
    shade = None if sheet.redundancy is None else _shade(sheet.redundancy)
    return Tile(number, sheet, math.sqrt(sheet.macs / largest), left, done(sheet), shade)


def done(sheet: Sheet) -> str:
    """What was done to a layer, in a word."""
    if sheet.macs_after is None:
        return "unplanned"
    if sheet.merged:
        return "merged"
    if sheet.chain is not None:
        return "both" if sheet.pruned else "chain"
    return "removed" if sheet.pruned else "same"


def kinds(sheets: Sequence[Sheet]) -> list[str]:
    """What was done to some layer, for the legend."""
    found = {done(sheet) for sheet in sheets}
    return [kind for kind in ("removed", "chain", "both", "merged", "same") if kind in found]


def first_shown(sheets: Sequence[Sheet]) -> int:
    """The layer that saved most; where nothing was planned, the one with the most MACs."""
    return max(range(len(sheets)), key=lambda n: sheets[n].macs - (sheets[n].macs_after or 0))


def _shade(share: float) -> int:
    return min(int(share * SHADES), SHADES - 1)


def spectrum_plot(cuts: Cuts) -> SpectrumPlot:
    """Singular values over the largest, against the rank."""
    width, height = SPECTRUM
    steps = max(len(cuts.values) - 1, 1)
    points = [(width * n / steps, height * (1 - value)) for n, value in enumerate(cuts.values)]
    line = " ".join(f"L{x:.1f} {y:.1f}" for x, y in points)
    area = f"M0 {height:g} {line} L{points[-1][0]:.1f} {height:g}Z"
    return SpectrumPlot(area, _at(cuts.rank_99, cuts), *(_at(mark, cuts) for mark in (cuts.chosen, cuts.kept)))  # type: ignore[arg-type]


def _at(rank: int | None, cuts: Cuts) -> float | None:
    if rank is None:
        return None
    return round(SPECTRUM[0] * min(max((rank - 1) / max(cuts.full_rank - 1, 1), 0.0), 1.0), 1)


def alike(blocks: Sequence[BlockRatio]) -> list[Alike]:
    """One row for blocks that follow each other with the same K, R and what comes after."""
    ratios = [block.k / max(block.r, 1) for block in blocks]
    found = []
    for (k, r, after), same in itertools.groupby(blocks, lambda b: (b.k, b.r, b.after)):
        group, ratio = list(same), k / max(r, 1)
        name = group[0].name if len(group) == 1 else f"{group[0].name} … {group[-1].name} ({len(group)})"
        known = sorted({block.trained_rank for block in group if block.trained_rank is not None})
        ranks = "–".join(f"{rank:,}" for rank in dict.fromkeys((known[0], known[-1]))) if known else ""
        found.append(Alike(name, k, r, ratio, ratio / (max(ratios) or 1.0), ranks, after))
    return found


def curve_plot(curve: Curve) -> Plot:
    """Predicted error against what is left of the MACs, in per cent."""
    frame = _Frame(CURVE, (46.0, 12.0, 14.0, 40.0))
    points = sorted([(1.0, 1.0, 0.0), *curve.points])
    everything = [*points, *([curve.chosen] if curve.chosen else [])]
    x = _scale(100 * min(p[0] for p in everything), 100.0)
    y = _scale(0.0, max(p[2] for p in everything))
    dots = [frame.dot(x, y, 100 * m, e, f"{100 * m:.1f} % of the MACs, {100 * p:.1f} % of the parameters, "
                      f"predicted error {e:.3g}") for m, p, e in points]  # fmt: skip
    chosen = None
    if curve.chosen is not None:
        macs, params, error = curve.chosen
        label = f"taken: {100 * macs:.1f} % of the MACs, {100 * params:.1f} % of the parameters, error {error:.3g}"
        chosen = frame.dot(x, y, 100 * macs, error, label)
    return frame.plot(x, y, " %", [_line(dots)], dots, chosen)


def cloud_plots(clouds: Clouds) -> list[tuple[Cloud, Plot]]:
    """Accuracy against norm loss, in per cent, a panel for each form, all on one scale."""
    frame = _Frame(PANEL, (34.0, 8.0, 8.0, 32.0))
    losses = [100 * loss for c in clouds.panels for loss in (*(p[2] for p in c.single), *(p[0] for p in c.joint))]
    x, y = _scale(0.0, max(losses, default=1.0)), _scale(0.0, max(100.0, clouds.base))
    found = []
    for cloud in clouds.panels:
        dots = [frame.dot(x, y, 100 * loss, top1, f"{layer}: norm loss {100 * loss:.1f} %, top-1 {top1:.2f} %",
                          _shade(depth)) for layer, depth, loss, top1 in cloud.single]  # fmt: skip
        joint = [frame.dot(x, y, 100 * loss, top1, "") for loss, top1 in ((0.0, clouds.base), *cloud.joint)]
        found.append((cloud, frame.plot(x, y, " %", [_line(joint)] if cloud.joint else [], dots)))
    return found


def check_places(check: Check) -> tuple[float, float, list[tuple[float, str]]]:
    """The error, the tolerance and the ticks on an axis of powers of ten, as shares of its length."""
    low, high = SCALE
    ticks = [((power - low) / (high - low), f"1e{power}") for power in range(-15, high + 1, 3)]
    return _power(check.error), _power(check.tolerance), ticks


def _power(value: float) -> float:
    low, high = SCALE
    return min(max(((math.log10(value) if value > 0 else low) - low) / (high - low), 0.0), 1.0)


class _Frame:
    """The inside of a drawing, with margins: left, right, top, bottom."""

    def __init__(self, size: tuple[float, float], margins: tuple[float, float, float, float]) -> None:
        self.left, self.right = margins[0], size[0] - margins[1]
        self.top, self.bottom = margins[2], size[1] - margins[3]

    def dot(self, x: Sequence[float], y: Sequence[float], at: float, value: float, label: str, shade: int = 0) -> Dot:
        return Dot(self._across(x, at), self._up(y, value), label, shade)

    def plot(
        self, x: Sequence[float], y: Sequence[float], unit: str, lines: Sequence[str], dots: Sequence[Dot],
        chosen: Dot | None = None,
    ) -> Plot:  # fmt: skip
        across = Axis(tuple((self._across(x, tick), f"{tick:g}{unit if tick == x[-1] else ''}") for tick in x))
        up = Axis(tuple((self._up(y, tick), f"{tick:g}") for tick in y))
        return Plot(self.left, self.right, self.top, self.bottom, across, up, tuple(lines), tuple(dots), chosen)

    def _across(self, ticks: Sequence[float], value: float) -> float:
        return round(self.left + (self.right - self.left) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    def _up(self, ticks: Sequence[float], value: float) -> float:
        return round(self.bottom - (self.bottom - self.top) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)


def _line(dots: Sequence[Dot]) -> str:
    return "M" + " L".join(f"{dot.x:g} {dot.y:g}" for dot in dots)


def _scale(low: float, high: float) -> list[float]:
    """Round numbers, four to seven, the first at most `low` and the last at least `high`."""
    high = high if high - low > 1e-9 else low + 1
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * n for n in (1, 2, 5, 10, 20) if span / (power * n) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * n:.12g}") for n in range(first, max(last, first + 1) + 1)]
