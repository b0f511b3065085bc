"""How the error of a fitted model falls with the number of samples, by simulation.

The papers (arXiv 2112.04857, ICLR 2021 submission uUlGTEbBRL) bound the error ||W^ - W*|| of the least-squares
estimate by a multiple of sqrt(d_M / n), for independent and for dependent inputs; d_M is
`convpare.redundancy.complexity.Design.sample_complexity`. Here W* is drawn, data are drawn, the factors are fitted, and
lines are fitted to the errors. Sizes, noise and inputs of the papers' own simulation are not known: those here are
choices. Everything is computed in float64 on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import block_diag
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.redundancy.complexity import Design, Kind
from convpare.redundancy.tuckerlike import (
    Factors,
    features,
    input_length,
    jacobian,
    pooled_windows,
    random_factors,
    weight_tensor,
)

Inputs = Literal["independent", "autoregressive"]
Start = Literal["truth", "random"]
FloatArray = NDArray[np.float64]

_STEPS = 300
_TOLERANCE = 1e-12  # relative change of the loss from which a fit has arrived
_LEAST_DAMPING = 1e-10  # relative to the mean diagonal of the normal equations


@dataclass(frozen=True)
class Setup:
    """How the data of a simulation are made, and where their fit starts.

    Attributes:
        strides: s_j, of the windows, one for each mode.
        pools: q_j, windows that are averaged, one for each mode.
        noise: standard deviation of the noise; W* has norm 1.
        correlation: of the autoregressive inputs, in (-1, 1): how much of a sample is the sample before.
        start: "truth": the fit starts at the factors of W*. The estimate is defined as the minimiser of the squared
            error and not by a way to find it, and the minimum nearest to W* is what the theory speaks of. "random":
            the best of `restarts` fits from random factors.
        restarts: fits for `start="random"`.

    Raises:
        ConvpareError: values outside of these ranges.
    """

    strides: tuple[int, ...] = (3, 3, 3)
    pools: tuple[int, ...] = (2, 1, 1)
    noise: float = 0.2
    correlation: float = 0.6
    start: Start = "truth"
    restarts: int = 5

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.pools) or min([*self.strides, *self.pools, self.restarts], default=0) < 1:
            raise ConvpareError(f"{self}: give one positive stride and pool for every mode, and one restart or more")
        if not (self.noise > 0 and abs(self.correlation) < 1):
            raise ConvpareError(f"{self}: give positive noise and a correlation between -1 and 1")
        if self.start not in get_args(Start):
            raise ConvpareError(f"start is {self.start!r}; give 'truth' or 'random'")


def draw_inputs(n: int, sizes: Sequence[int], correlation: float, generator: torch.Generator) -> Tensor:
    """X_1 ... X_n, (n, d_1, ..., d_N): standard normal, and autoregressive of order one over the samples.

    x_i = correlation x_{i-1} shifted cyclically by one entry + sqrt(1 - correlation²) e_i, for vectorised X and
    standard normal e. The stationary covariance is the identity whatever the correlation; the covariance of x_i and
    x_{i-h} is correlation^h times the shift by h. The first sample is drawn from the stationary distribution.
    """
    x = _normal((n, int(np.prod(sizes))), generator)
    if correlation:
        x[1:] *= sqrt(1 - correlation**2)
        for i in range(1, n):
            x[i] += correlation * x[i - 1].roll(1)
    return x.reshape(n, *sizes)


def draw_truth(design: Design, generator: torch.Generator) -> Factors:
    """Factors of a W* of norm 1: standard normal ones, the heads scaled."""
    *factors, heads = random_factors(design, generator)
    return *factors, heads / weight_tensor(design, (*factors, heads)).norm()


def least_squares(design: Design, gram: Tensor, cross: Tensor, start: Factors) -> Factors:
    """Factors that minimise <W, gram W> - 2 <cross, W>, by damped Gauss-Newton steps (Levenberg, Marquardt).

    With gram = Z^T Z / n and cross = Z^T y / n this is the mean squared error of the model, up to a constant. The
    minimum found is the one that leads downhill from `start`. Freedom of the factors that leaves W as it is does no
    harm: the damping keeps it still.

    Args:
        gram: (LP, LP), in the order of W flattened.
        cross: (LP,).
    """
    factors, damping = start, 1e-3
    weight = weight_tensor(design, factors).flatten()
    loss = _loss(weight, gram, cross)
    for _ in range(_STEPS):
        derivative = jacobian(design, factors)
        curvature = derivative.T @ gram @ derivative
        curvature.diagonal().add_(damping * curvature.diagonal().mean())
        step = torch.linalg.solve(curvature, derivative.T @ (cross - gram @ weight))
        candidate = _moved(factors, step)
        weight_there = weight_tensor(design, candidate).flatten()
        gain = loss - _loss(weight_there, gram, cross)
        if gain > 0:
            factors, weight, loss, damping = candidate, weight_there, loss - gain, max(damping / 10, _LEAST_DAMPING)
        else:
            damping *= 10
        if abs(gain) < _TOLERANCE * abs(loss):
            break
    return factors


def estimation_error(design: Design, inputs: Inputs, n: int, seed: int, setup: Setup = Setup()) -> float:
    """||W^ - W*||_F of one simulated data set of n samples, with a W* of its own.

    Everything random follows from the arguments: other designs, inputs, n and seeds give independent data. torch's
    global random state is neither used nor changed.

    Raises:
        ConvpareError: fewer than one sample, or a setup for another number of modes.
    """
    if n < 1 or len(setup.strides) != design.order:
        raise ConvpareError(
            f"n is {n}, modes are {design.order}, strides {setup.strides}; give n >= 1, one stride a mode"
        )
    generator = _generator(design, inputs, n, seed)
    truth = draw_truth(design, generator)
    weight = weight_tensor(design, truth).flatten()
    gram, cross = _moments(design, weight, inputs, n, setup, generator)
    starts = [truth]
    if setup.start == "random":
        starts = [_random_start(design, gram, cross, generator) for _ in range(setup.restarts)]
    fits = [weight_tensor(design, least_squares(design, gram, cross, start)).flatten() for start in starts]
    best = min(fits, key=lambda fit: _loss(fit, gram, cross))
    return float((best - weight).norm())


class Interval(NamedTuple):
    """An estimate with its 95% confidence interval (Student's t)."""

    value: float
    low: float
    high: float


class Line(NamedTuple):
    """error = slope t + intercept with t = sqrt(d_M / n), and rate, the slope of the line through the origin.

    r2: the share of the variance of the errors that the line explains.
    """

    slope: Interval
    intercept: Interval
    r2: float
    rate: Interval


def fit_line(t: ArrayLike, errors: ArrayLike) -> Line:
    """The line through errors measured at t = sqrt(d_M / n), and the one through the origin.

    The spread of the errors grows in proportion to t, so they are weighted by 1/t²: the lines are fitted to errors / t.

    Raises:
        ConvpareError: fewer than three points, or all at one t.
    """
    t, errors = _checked(t, errors)
    columns = np.stack([np.ones_like(t), 1 / t], 1)
    ratio = errors / t
    coefficients, residual = _solve(columns, ratio)
    free = len(t) - 2
    spread = np.sqrt(residual / free * np.linalg.inv(columns.T @ columns).diagonal())
    slope, intercept = (_interval(*pair, free) for pair in zip(coefficients, spread, strict=True))
    off = errors - columns @ coefficients * t
    r2 = 1 - float(off @ off) / float(((errors - errors.mean()) ** 2).sum())
    rate = _interval(ratio.mean(), ratio.std(ddof=1) / sqrt(len(t)), len(t) - 1)
    return Line(slope, intercept, r2, rate)


def equal_slopes(groups: Sequence[tuple[ArrayLike, ArrayLike]]) -> float:
    """The p-value of an F-test that groups of (t, errors) have lines of one slope, each with an intercept of its own.

    Weighted as `fit_line`. Small values speak against one slope.

    Raises:
        ConvpareError: fewer than two groups, or a group too small for a line.
    """
    checked = _checked_groups(groups)
    own = [np.stack([np.ones_like(t), 1 / t], 1) for t, _ in checked]
    ratio = np.concatenate([errors / t for t, errors in checked])
    _, apart = _solve(block_diag(*own), ratio)
    _, common = _solve(np.hstack([np.ones((len(ratio), 1)), block_diag(*[rows[:, 1:] for rows in own])]), ratio)
    extra, free = len(own) - 1, len(ratio) - 2 * len(own)
    from scipy import stats  # half a second to import

    return float(stats.f.sf((common - apart) / extra / (apart / free), extra, free))


def equal_rates(groups: Sequence[tuple[ArrayLike, ArrayLike]]) -> float:
    """The p-value of an F-test that groups of (t, errors) share one line through the origin; see `equal_slopes`."""
    from scipy import stats  # half a second to import

    return float(stats.f_oneway(*[errors / t for t, errors in _checked_groups(groups)]).pvalue)


def _checked_groups(groups: Sequence[tuple[ArrayLike, ArrayLike]]) -> list[tuple[FloatArray, FloatArray]]:
    if len(groups) < 2:
        raise ConvpareError(f"there are {len(groups)} groups to compare; give two or more")
    return [_checked(*group) for group in groups]


def _checked(t: ArrayLike, errors: ArrayLike) -> tuple[FloatArray, FloatArray]:
    t, errors = np.asarray(t, float), np.asarray(errors, float)
    if t.ndim != 1 or t.shape != errors.shape or len(t) < 3 or t.min() <= 0 or t.min() == t.max():
        raise ConvpareError(f"a line needs three points or more at two positive t or more; t is {t}")
    return t, errors


def _solve(columns: FloatArray, values: FloatArray) -> tuple[FloatArray, float]:
    """The least-squares coefficients and the sum of squared residuals."""
    coefficients = np.asarray(np.linalg.lstsq(columns, values)[0], float)
    return coefficients, float(((values - columns @ coefficients) ** 2).sum())


def _interval(value: float, spread: float, free: int) -> Interval:
    from scipy import stats  # half a second to import

    half = float(stats.t.ppf(0.975, free)) * float(spread)
    return Interval(float(value), float(value) - half, float(value) + half)


def _moments(
    design: Design, weight: Tensor, inputs: Inputs, n: int, setup: Setup, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Z^T Z / n and Z^T y / n: all of the data that least squares sees."""
    modes = list(zip(design.lengths, setup.strides, setup.pools, design.pooled, strict=True))
    sizes = [input_length(*mode) for mode in modes]
    windows = [pooled_windows(size, *mode[:3]) for size, mode in zip(sizes, modes, strict=True)]
    x = draw_inputs(n, sizes, setup.correlation if inputs == "autoregressive" else 0.0, generator)
    z = features(x, windows).flatten(1)
    y = z @ weight + setup.noise * _normal((n,), generator)
    return z.T @ z / n, z.T @ y / n


def _random_start(design: Design, gram: Tensor, cross: Tensor, generator: torch.Generator) -> Factors:
    """Random factors, their heads scaled to fit best."""
    *factors, heads = random_factors(design, generator)
    weight = weight_tensor(design, (*factors, heads)).flatten()
    return *factors, heads * (cross @ weight) / (weight @ gram @ weight)


def _loss(weight: Tensor, gram: Tensor, cross: Tensor) -> float:
    return float(weight @ gram @ weight - 2 * cross @ weight)


def _moved(factors: Factors, step: Tensor) -> Factors:
    parts = step.split([factor.numel() for factor in factors])
    return tuple(factor + part.reshape(factor.shape) for factor, part in zip(factors, parts, strict=True))


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)


def _generator(design: Design, inputs: Inputs, n: int, seed: int) -> torch.Generator:
    sizes = [*design.lengths, *design.pooled, design.K, design.R or 0, *(design.ranks or ())]
    entropy = [seed, n, get_args(Kind).index(design.kind), get_args(Inputs).index(inputs), *sizes]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
