"""What a convolutional layer costs in samples, beside what it costs in numbers: counted, computed and simulated."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from math import inf, sqrt
from pathlib import Path
from typing import Any, get_args

from convpare.errors import ConvpareError
from convpare.notebook import html_table
from convpare.points import PointStore
from convpare.redundancy.complexity import Design, Kind
from convpare.redundancy.estimation import (
    Inputs,
    Interval,
    Line,
    Setup,
    equal_rates,
    equal_slopes,
    estimation_error,
    fit_line,
)
from convpare.redundancy.tuckerlike import jacobian_rank

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TheoryOptions:
    """What is simulated. The figures are choices; those of the papers are not known.

    Attributes:
        lengths, pooled: of the kernels and of the pooled outputs, one for each mode; see `Design`.
        R, ranks: of the Tucker and CP models.
        K: numbers of output channels, R or more each.
        inputs: "independent", "autoregressive" or both.
        ratios: n / d_M, the numbers of samples as multiples of the sample complexity.
        straight_from: the ratio from which points enter the lines; with fewer samples errors are larger than linear.
        repetitions: data sets for every model, inputs and n; each has a W* of its own.
        seed: of the first repetition; the others count up.
        setup: of the data and of the fit.

    Raises:
        ConvpareError: impossible sizes, or too few points for a line.
    """

    lengths: tuple[int, ...] = (3, 3, 3)
    pooled: tuple[int, ...] = (2, 2, 2)
    R: int = 2
    ranks: tuple[int, ...] = (2, 2, 2)
    K: tuple[int, ...] = (2, 4, 6)
    inputs: tuple[Inputs, ...] = get_args(Inputs)
    ratios: tuple[float, ...] = (3, 4, 6, 9, 16, 25, 64)
    straight_from: float = 9
    repetitions: int = 8
    seed: int = 0
    setup: Setup = field(default_factory=Setup)

    def __post_init__(self) -> None:
        if len(set(self.straight)) < 2 or not all(1 <= ratio < inf for ratio in self.ratios):
            raise ConvpareError(
                f"ratios are {self.ratios}; give finite numbers of 1 or more, and two from {self.straight_from:g} on "
                "(straight_from)"
            )
        if self.repetitions < 2 or self.seed < 0:
            raise ConvpareError(
                f"repetitions are {self.repetitions}, the seed is {self.seed}; give two or more, a seed >= 0"
            )
        if not self.inputs or not set(self.inputs) <= set(get_args(Inputs)):
            raise ConvpareError(f"inputs are {self.inputs}; give one or more of {get_args(Inputs)}")
        if not self.designs or any(len(set(given)) < len(given) for given in (self.K, self.inputs, self.ratios)):
            raise ConvpareError(f"K is {self.K}, inputs {self.inputs}, ratios {self.ratios}; give each value once")
        if len(self.setup.strides) != len(self.lengths):
            raise ConvpareError(f"strides are {self.setup.strides}, lengths {self.lengths}; give one of each a mode")

    @property
    def straight(self) -> tuple[float, ...]:
        """The ratios whose points enter the lines."""
        return tuple(ratio for ratio in self.ratios if ratio >= self.straight_from)

    @property
    def designs(self) -> tuple[Design, ...]:
        """The models: CNN, Tucker and CP, for every K."""
        extra: dict[Kind, tuple[Any, ...]] = {"cnn": (), "tucker": (self.R, self.ranks), "cp": (self.R,)}
        return tuple(
            Design(kind, self.lengths, self.pooled, K, *extra[kind]) for kind in get_args(Kind) for K in self.K
        )


@dataclass(frozen=True)
class Point:
    """One data set: its model, inputs and size n, and error = ||W^ - W*||_F, where W* has norm 1."""

    kind: Kind
    inputs: Inputs
    K: int
    n: int
    d_M: int  # noqa: N815
    error: float
    seed: int

    @property
    def t(self) -> float:
        """sqrt(d_M / n)."""
        return sqrt(self.d_M / self.n)


@dataclass(frozen=True)
class Fit:
    """The lines through the points of one model with one kind of inputs, as far as they are straight.

    Attributes:
        points: how many entered.
        line: see `Line`.
        bend: how far the mean error at the fewest samples is above the line through the origin, as a share of the line.
    """

    kind: Kind
    inputs: Inputs
    K: int
    points: int
    line: Line
    bend: float


@dataclass(frozen=True)
class Comparison:
    """Whether the lines depend on K: p-values of `equal_slopes` and `equal_rates`; small values say that they do."""

    kind: Kind
    inputs: Inputs
    equal_slopes: float
    equal_rates: float


@dataclass(frozen=True)
class Rank:
    """The counts of one model, and the rank of its Jacobian, which is computed and should equal `intrinsic`."""

    kind: Kind
    K: int
    naive: int
    sample: int
    intrinsic: int
    jacobian: int


@dataclass(frozen=True)
class Theory:
    """The simulation: its points in the order of the options, lines through them, and the counts of its models."""

    options: TheoryOptions
    points: tuple[Point, ...]
    fits: tuple[Fit, ...]
    comparisons: tuple[Comparison, ...]
    ranks: tuple[Rank, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "options": asdict(self.options),
            "points": [asdict(point) for point in self.points],
            "fits": [
                {"kind": fit.kind, "inputs": fit.inputs, "K": fit.K, "points": fit.points, **_line(fit.line),
                 "bend": fit.bend} for fit in self.fits
            ],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "ranks": [asdict(rank) for rank in self.ranks],
        }  # fmt: skip

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        counts = [(r.kind, r.K, r.naive, r.sample, r.intrinsic, r.jacobian) for r in self.ranks]
        lines = [
            (f.kind, f.inputs, f.K, *(_plus_minus(x, 3) for x in (f.line.slope, f.line.intercept, f.line.rate)))
            for f in self.fits
        ]
        return html_table(("model", "K", "naive d_#", "d_M", "dimension", "Jacobian rank"), counts) + html_table(
            ("model", "inputs", "K", "slope", "intercept", "through 0"), lines, "error against √(d_M/n), ± 95 %"
        )

    def __str__(self) -> str:
        counts = [f"{'model':<8}{'K':>2}{'naive d_#':>11}{'d_M':>6}{'gap':>6}{'dimension':>11}{'Jacobian rank':>15}"]
        counts += [
            f"{row.kind:<8}{row.K:>2}{row.naive:>11}{row.sample:>6}{row.naive - row.sample:>6}"
            f"{row.intrinsic:>11}{row.jacobian:>15}"
            for row in self.ranks
        ]
        few = f"at n = {min(self.options.ratios):g} d_M"
        lines = [f"{'model':<8}{'inputs':<14}{'K':>2}{'slope':>16}{'intercept':>20}{'R²':>7}{'through 0':>16}{few:>16}"]
        lines += [
            f"{fit.kind:<8}{fit.inputs:<14}{fit.K:>2}{_plus_minus(fit.line.slope, 3):>16}"
            f"{_plus_minus(fit.line.intercept, 4):>20}{fit.line.r2:>7.2f}{_plus_minus(fit.line.rate, 3):>16}"
            f"{fit.bend:>+16.0%}"
            for fit in self.fits
        ]
        tests = [f"{'model':<8}{'inputs':<14}{'p, one slope':>18}{'p, one line through 0':>25}"]
        tests += [f"{c.kind:<8}{c.inputs:<14}{c.equal_slopes:>18.3f}{c.equal_rates:>25.3f}" for c in self.comparisons]
        return "\n".join([
            *counts, "",
            f"error = slope √(d_M/n) + intercept from n = {self.options.straight_from:g} d_M on, ± 95%; "
            f"{few} the error lies above the line through 0:", *lines,
            *(["", "F-tests over K: a small p says that the lines depend on K", *tests] if self.comparisons else []),
        ])  # fmt: skip


def theory(
    options: TheoryOptions = TheoryOptions(), store: Path | None = None, on_progress: Progress | None = None
) -> Theory:
    """Count, compute and simulate the statistical model of CNNs of arXiv 2112.04857; see docs/theory.md.

    The ranks of the Jacobians are the dimensions of the models. The simulation fits random models to random data: the
    error should be linear in sqrt(d_M / n) and, where R is given, should not depend on K.

    Args:
        store: a file with a JSON line for every point, written as they come. What it holds already is not measured
            again, and points of other options are left alone. A last line that an interruption cut off is dropped.
        on_progress: called with ("simulating", points done, points in all).

    Raises:
        ConvpareError: the store holds something else, or cannot be read or written.
    """
    ranks = tuple(
        Rank(d.kind, d.K, d.naive_count, d.sample_complexity(), d.intrinsic_dimension, jacobian_rank(d))
        for d in options.designs
    )
    points = tuple(_simulate(options, store, on_progress or (lambda *_: None)))
    fits: list[Fit] = []
    comparisons: list[Comparison] = []
    for kind, inputs in product(get_args(Kind), options.inputs):
        by_k = [[p for p in points if (p.kind, p.inputs, p.K) == (kind, inputs, K)] for K in options.K]
        fits += [_fit(of_one, options) for of_one in by_k]
        if len(by_k) > 1:
            groups = [_coordinates(_straight(of_one, options)) for of_one in by_k]
            comparisons.append(Comparison(kind, inputs, equal_slopes(groups), equal_rates(groups)))
    return Theory(options, points, tuple(fits), tuple(comparisons), ranks)


def _simulate(options: TheoryOptions, store: Path | None, tell: Progress) -> Iterator[Point]:
    known = PointStore(store, "simulation", _is_point)
    seeds = range(options.seed, options.seed + options.repetitions)
    jobs = list(product(options.designs, options.inputs, options.ratios, seeds))
    for done, (design, inputs, ratio, seed) in enumerate(jobs):
        tell("simulating", done, len(jobs))
        d_sample = design.sample_complexity()
        n = round(ratio * d_sample)
        settings = {**asdict(design), "inputs": inputs, "n": n, "seed": seed, **asdict(options.setup)}
        found = known.get(settings)
        if found is None:
            found = known.add(settings, {"error": estimation_error(design, inputs, n, seed, options.setup)})
        yield Point(design.kind, inputs, design.K, n, d_sample, found["error"], seed)
    tell("simulating", len(jobs), len(jobs))


def _fit(points: list[Point], options: TheoryOptions) -> Fit:
    straight = _straight(points, options)
    line = fit_line(*_coordinates(straight))
    fewest = min(point.n for point in points)
    rates = [point.error / point.t for point in points if point.n == fewest]
    bend = sum(rates) / len(rates) / line.rate.value - 1
    return Fit(points[0].kind, points[0].inputs, points[0].K, len(straight), line, bend)


def _straight(points: list[Point], options: TheoryOptions) -> list[Point]:
    numbers = {round(ratio * points[0].d_M) for ratio in options.straight}
    return [point for point in points if point.n in numbers]


def _coordinates(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.t for point in points], [point.error for point in points]


def _is_point(found: Mapping[str, Any]) -> bool:
    return type(found.get("error")) is float and 0 <= found["error"] < inf


def _line(line: Line) -> dict[str, Any]:
    return {name: part._asdict() if isinstance(part, Interval) else part for name, part in line._asdict().items()}


def _plus_minus(interval: Interval, digits: int) -> str:
    return f"{interval.value:.{digits}f} ± {interval.high - interval.value:.{digits}f}"
