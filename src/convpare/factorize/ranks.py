"""How ranks are chosen: by number, by share of the full rank or of the energy, by size, or from a kernel's noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.factorize.forms import Form, block_shape
from convpare.factorize.subspaces import singular_values
from convpare.redundancy.cuts import Kernel

Rule = Literal["number", "fraction", "energy", "break-even", "vbmf"]
VALUELESS: tuple[Rule, ...] = ("break-even", "vbmf")


@dataclass(frozen=True)
class Ranks:
    """A rule for the ranks of a form, and its values: one for all ranks, or one for each.

    - number: the ranks themselves, of one group.
    - fraction: shares of the full ranks, rounded, at least 1.
    - energy: for each cut of the form the smallest rank that keeps this share of the squared norm.
    - break-even: the largest ranks, all about the same share of the full ones, at which the chain has fewer parameters
      than the layer.
    - vbmf: for each cut of the form the rank that variational Bayes finds in noise, see `vbmf_rank`; at least 1.

    Where groups differ, energy is that of all groups, and of the ranks of vbmf the largest counts.
    """

    rule: Rule
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        in_range = (x >= 1 and x == int(x) if self.rule == "number" else 0 < x <= 1 for x in self.values)
        if bool(self.values) == (self.rule in VALUELESS) or not all(in_range):
            raise ConvpareError(f"ranks are {str(self)!r}; {_EXPECTED}")

    @staticmethod
    def parse(text: str) -> "Ranks":
        """From "16" or "16,8" (numbers), "0.5" (fraction), "energy:0.99", "break-even" or "vbmf".

        Raises:
            ConvpareError: it is none of these, or a value is out of range.
        """
        plain = text.replace(" ", "")
        for rule in VALUELESS:
            if plain == rule:
                return Ranks(rule)
        listed = plain.removeprefix("energy:").split(",")
        try:
            if all(x.isdigit() for x in listed) and "energy" not in plain:
                return Ranks("number", tuple(map(int, listed)))
            return Ranks("energy" if plain.startswith("energy") else "fraction", tuple(map(float, listed)))
        except ValueError:
            raise ConvpareError(f"ranks are {text!r}; {_EXPECTED}") from None

    @staticmethod
    def of(value: "RanksLike") -> "Ranks":
        """From what `parse` reads, or from a number or several, integers for numbers, floats for fractions."""
        if isinstance(value, Ranks):
            return value
        if isinstance(value, str):
            return Ranks.parse(value)
        listed = (value,) if isinstance(value, int | float) else tuple(value)
        return Ranks("number" if all(isinstance(x, int) for x in listed) else "fraction", listed)

    def __str__(self) -> str:
        if self.rule in VALUELESS:
            return self.rule
        values = ",".join(map(str, self.values))
        return f"energy:{values}" if self.rule == "energy" else values

    def resolve(self, form: Form, kernel: Kernel, transposed: bool = False) -> tuple[int, ...]:
        """The ranks of a form for a kernel, without what they make superfluous in one another.

        Raises:
            ConvpareError: a rank is too large, there are too many or too few values, or no ranks break even.
        """
        full = form.full_ranks(kernel)
        return form.feasible(kernel, self._chosen(form, kernel, transposed, full))

    def _chosen(self, form: Form, kernel: Kernel, transposed: bool, full: tuple[int, ...]) -> tuple[int, ...]:
        if self.rule == "break-even":
            return _break_even(form, kernel, transposed, full)
        if self.rule == "number":
            return _within(form, full, tuple(int(x) for x in self._for_each(form, full)))
        if self.rule == "fraction":
            return tuple(max(1, round(x * f)) for x, f in zip(self._for_each(form, full), full, strict=True))
        cuts = form.cuts(kernel)
        values = [singular_values(kernel.unfold(cut)) for cut in cuts]
        if self.rule == "vbmf":
            found = tuple(max(1, vbmf_rank(s, *block_shape(kernel, c))) for s, c in zip(values, cuts, strict=True))
        else:
            shares = self.values * len(cuts) if len(self.values) == 1 else self._for_each(form, full)
            found = tuple(_energy_rank(s, share) for s, share in zip(values, shares, strict=True))
        return tuple(map(min, form.ranks_of_cuts(found), full))

    def _for_each(self, form: Form, full: tuple[int, ...]) -> tuple[float, ...]:
        if len(self.values) not in (1, len(full)):
            raise ConvpareError(f"ranks are {self}, for {form.name}; give 1 or {len(full)}, its full ranks are {full}")
        return self.values * len(full) if len(self.values) == 1 else self.values


RanksLike = Ranks | str | int | float | Sequence[int] | Sequence[float]

_EXPECTED = (
    'expected numbers from 1 such as "16" or "16,8", fractions of the full rank above 0 up to 1 such as "0.5", '
    '"energy:0.99", "break-even" or "vbmf"'
)


def vbmf_rank(values: Tensor, rows: int, columns: int) -> int:
    """The rank of a matrix in Gaussian noise of unknown strength: empirical variational Bayes matrix factorization.

    The global analytic solution of Nakajima et al. (JMLR 14, 2013): a component stays if its singular value exceeds a
    threshold that follows from the noise variance and the shape; the variance minimises the free energy, which is a
    function of it alone. Of several matrices the noise is taken to be the same, and the largest rank is given.

    Args:
        values: (b, min(rows, columns)), singular values.
    """
    short, long = sorted((rows, columns))
    squares = values.double().cpu().numpy() ** 2 / long
    aspect = short / long
    threshold = vbmf_threshold(aspect)
    top = squares.mean()
    if top == 0:
        return 0
    tail = squares[:, math.ceil(short / (1 + aspect)) - 1 :]
    low = max(min(float(np.maximum(tail[:, 0] / threshold, tail.mean(1)).min()), top), 1e-12 * top)
    grid = np.linspace(math.log(low), math.log(top), 200)
    best = int(np.argmin([_free_energy(x, squares, aspect, threshold) for x in grid]))
    found = minimize_scalar(
        _free_energy,
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, 199)]),
        args=(squares, aspect, threshold),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return int((squares > threshold * math.exp(found.x)).sum(1).max())


def vbmf_threshold(aspect: float) -> float:
    """The squared singular value, over the longer side and the noise variance, that is told from noise.

    Args:
        aspect: of the shorter side to the longer.
    """
    edge = float(brentq(lambda t: _phi(t) + _phi(t / aspect), 1e-9, 1e9, xtol=1e-12))
    return (1 + edge) * (1 + aspect / edge)


def _phi(z: float) -> float:
    return math.log1p(z) / z - 0.5


def _free_energy(log_variance: float, squares: np.ndarray, aspect: float, threshold: float) -> float:
    """Up to constants, per unit of the noise; `squares` are singular values squared over the longer side."""
    x = np.maximum(squares * math.exp(-log_variance), 1e-300)
    kept = x[x > threshold] - (1 + aspect)
    strength = (kept + np.sqrt(np.maximum(kept**2 - 4 * aspect, 0))) / 2
    gain = np.log1p(strength) + aspect * np.log1p(strength / aspect) - strength
    return float((x - np.log(x)).sum() + gain.sum())


def _energy_rank(values: Tensor, share: float) -> int:
    """The smallest rank, the same in all blocks, at which they keep this share of the squared norm."""
    kept = values.square().sum(0).cumsum(0)
    return min(int((kept < share * kept[-1] * (1 - 1e-12)).sum()) + 1, len(kept))


def _break_even(form: Form, kernel: Kernel, transposed: bool, full: tuple[int, ...]) -> tuple[int, ...]:
    steps = max(full)
    for step in range(steps, 0, -1):
        ranks = form.feasible(kernel, tuple(max(1, step * f // steps) for f in full))
        if sum(map(math.prod, form.shapes(kernel, ranks, transposed))) < kernel.tensor.numel():
            return ranks
    raise ConvpareError(
        f"{form.name} has at no rank fewer parameters than the kernel {tuple(kernel.weight(transposed).shape)}; leave "
        "this layer as it is"
    )


def _within(form: Form, full: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    if any(r > f for r, f in zip(ranks, full, strict=True)):
        raise ConvpareError(f"ranks are {ranks} for {form.name}; the full ranks of this kernel are {full}")
    return ranks
