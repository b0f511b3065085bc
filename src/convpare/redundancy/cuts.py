"""Cuts through a kernel: how much of it repeats itself between two sets of its indices (arXiv 2403.14379).

A kernel has an output index o, an input index i and a spatial index for each dimension: w; h and w; d, h and w. A cut
splits them into two sets; the kernel, unfolded to a matrix with one set on either side, has a spectrum of singular
values, and a low rank there is redundancy that a chain of two smaller convolutions removes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.redundancy.gram import lower_gram

SPATIAL = ("", "w", "hw", "dhw")
Route = Literal["auto", "gram", "svd"]


@dataclass(frozen=True, order=True)
class Cut:
    """Indices of a kernel split in two, such as oi|hw; the smaller side comes first, of equal ones that with o."""

    left: str
    right: str

    @property
    def name(self) -> str:
        return f"{self.left}|{self.right}"

    @property
    def splits_channels(self) -> bool:
        """Whether o and i stand on different sides."""
        return ("o" in self.left) != ("i" in self.left)

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(name: str) -> "Cut":
        """The cut of this name; the order of the sides and of the letters on a side does not matter.

        Raises:
            ConvpareError: the name is not two sets of the letters o, i and d, h, w with | between.
        """
        left, bar, right = name.replace(" ", "").partition("|")
        spatial = len(left + right) - 2
        letters = "oi" + SPATIAL[spatial] if 0 <= spatial <= 3 else ""
        if not (left and bar and right and sorted(left + right) == sorted(letters)):
            raise ConvpareError(
                f"{name!r} is no cut; expected the indices of a kernel in two parts with | between: o, i, and w, hw or "
                "dhw, such as o|ihw, oi|hw or oh|iw"
            )
        return _cut(letters, left)


def cuts_of(dimensions: int) -> tuple[Cut, ...]:
    """All 2^(N+1) - 1 cuts of a kernel with N spatial dimensions, 0 (a linear layer) to 3."""
    letters = "oi" + SPATIAL[dimensions]
    found = [
        _cut(letters, "".join(side))
        for size in range(1, len(letters) // 2 + 1)
        for side in combinations(letters, size)
        if 2 * size < len(letters) or "o" in side
    ]
    return tuple(found)


def _cut(letters: str, side: str) -> Cut:
    first = "".join(c for c in letters if c in side)
    second = "".join(c for c in letters if c not in side)
    swap = len(first) > len(second) or (len(first) == len(second) and "o" in second)
    return Cut(second, first) if swap else Cut(first, second)


@dataclass(frozen=True)
class Kernel:
    """A layer's weight with its indices in the order (groups, o, i, *spatial).

    A grouped convolution is a dense one whose kernel is zero between groups; its cuts are the dense kernel's.
    """

    tensor: Tensor

    @staticmethod
    def of(weight: Tensor, groups: int = 1, transposed: bool = False) -> "Kernel":
        """From a weight in PyTorch's layout: (o, i/groups, *spatial), transposed convolutions (i, o/groups, *spatial).

        Raises:
            ConvpareError: it has no such shape, or holds NaN or infinity.
        """
        if not 2 <= weight.ndim <= 5 or not weight.numel() or weight.shape[0] % groups:
            raise ConvpareError(
                f"a weight of shape {tuple(weight.shape)} in {groups} groups is no kernel; expected that of a linear "
                "layer or a convolution, with 2 to 5 axes, none of them empty"
            )
        if not bool(torch.isfinite(weight).all()):
            raise ConvpareError("the weight holds NaN or infinity; give a model whose weights are numbers")
        blocks = weight.detach().unflatten(0, (groups, -1))
        return Kernel(blocks.transpose(1, 2) if transposed else blocks)

    @property
    def dimensions(self) -> int:
        return self.tensor.ndim - 3

    @property
    def groups(self) -> int:
        return self.tensor.shape[0]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each index of the dense kernel."""
        groups, out, into, *spatial = self.tensor.shape
        named = zip(SPATIAL[self.dimensions], spatial, strict=True)
        return {"o": groups * out, "i": groups * into, **dict(named)}

    def blocks(self, cut: Cut) -> tuple[int, int, int]:
        """How many blocks the dense kernel's unfolding has, zero elsewhere, and the rows and columns of one."""
        count, rows, columns = (math.prod(self._size(c) for c in side) for side in self._sides(cut))
        return count, rows, columns

    def unfold(self, cut: Cut) -> Tensor:
        """The blocks (count, rows, columns) of the dense kernel's unfolding."""
        order = "".join(self._sides(cut))
        return self.tensor.permute([self._letters.index(c) for c in order]).reshape(self.blocks(cut))

    def fold(self, blocks: Tensor, cut: Cut) -> "Kernel":
        """The kernel of such blocks: the inverse of `unfold`."""
        order = "".join(self._sides(cut))
        tensor = blocks.reshape([self._size(c) for c in order])
        return Kernel(tensor.permute([order.index(c) for c in self._letters]))

    def weight(self, transposed: bool = False) -> Tensor:
        """Back in PyTorch's layout."""
        return (self.tensor.transpose(1, 2) if transposed else self.tensor).flatten(0, 1).contiguous()

    @property
    def _letters(self) -> str:
        return "goi" + SPATIAL[self.dimensions]

    def _size(self, letter: str) -> int:
        return self.tensor.shape[self._letters.index(letter)]

    def _sides(self, cut: Cut) -> tuple[str, str, str]:
        """The indices that number blocks, rows and columns; groups go with o and i where these go together."""
        if cut.splits_channels:
            return "g", cut.left, cut.right
        return ("", "g" + cut.left, cut.right) if "o" in cut.left else ("", cut.left, "g" + cut.right)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of a kernel across a cut, and what they say.

    Two scales of what a truncation loses, never to be mixed: the norm loss 1 - ‖T_χ‖/‖T‖, and the relative error
    ‖T - T_χ‖/‖T‖ = √(1 - ‖T_χ‖²/‖T‖²). A norm loss of 10 % is a relative error of 43.6 %.

    Attributes:
        cut: where the kernel was cut.
        values: float64, falling; as many as the unfolding can have (`full_rank`).
        rows, columns: of one block of the unfolding.
        blocks: how many blocks; more than one where a grouped convolution's o and i are split.
        resolution: singular values below this share of the largest are indistinguishable from zero.
    """

    cut: Cut
    values: Tensor
    rows: int
    columns: int
    blocks: int
    resolution: float

    @property
    def full_rank(self) -> int:
        return len(self.values)

    @property
    def break_even_rank(self) -> int:
        """The largest rank at which the two factors have fewer parameters than the kernel: χ(m + n) < mn in a block."""
        return self.blocks * (math.ceil(self.rows * self.columns / (self.rows + self.columns)) - 1)

    @cached_property
    def energy(self) -> Tensor:
        """σ²/Σσ², the share of the squared norm in each component; zeros for a kernel of zeros."""
        squares = self.values.square()
        return squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)

    @property
    def rank(self) -> int:
        """The numerical rank: singular values above `resolution` times the largest."""
        return int((self.values > self.resolution * self.values[0]).sum())

    @property
    def entropy(self) -> float:
        """S = -Σ p ln p of the energies, in nats; 0 if one component holds all."""
        return float(torch.special.entr(self.energy).sum())

    @property
    def effective_rank(self) -> float:
        """exp(S): as many components of equal energy have this entropy; 0 for a kernel of zeros."""
        return math.exp(self.entropy) if self.values[0] > 0 else 0.0

    @property
    def participation_ratio(self) -> float:
        """1/Σp²."""
        return float(1 / self.energy.square().sum()) if self.values[0] > 0 else 0.0

    @property
    def stable_rank(self) -> float:
        """‖T‖²/σ₁²."""
        return float(1 / self.energy[0]) if self.values[0] > 0 else 0.0

    def rank_at(self, energy: float) -> int:
        """The smallest rank that keeps this share of the squared norm.

        Raises:
            ConvpareError: `energy` is not in (0, 1].
        """
        if not 0 < energy <= 1:
            raise ConvpareError(f"energy is {energy}; expected a share of the squared norm above 0 and up to 1")
        if self.values[0] == 0:
            return 0
        kept = self.energy.cumsum(0)
        return min(int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1, max(self.rank, 1))

    def norm_loss(self, rank: int) -> float:
        """1 - ‖T_χ‖/‖T‖ of the best approximation of this rank."""
        return float(self.energy[rank:].sum() / (1 + self.energy[:rank].sum().sqrt()))

    def relative_error(self, rank: int) -> float:
        """‖T - T_χ‖/‖T‖ of the best approximation of this rank."""
        return math.sqrt(min(float(self.energy[rank:].sum()), 1.0))

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "full_rank": self.full_rank,
            "break_even_rank": self.break_even_rank,
            "rank_99": self.rank_at(0.99),
            "entropy": self.entropy,
            "effective_rank": self.effective_rank,
            "participation_ratio": self.participation_ratio,
            "stable_rank": self.stable_rank,
        }


def norm_loss_of(relative_error: float) -> float:
    """1 - ‖T_χ‖/‖T‖ from ‖T - T_χ‖/‖T‖, where T_χ is an orthogonal projection of T: 0.436 → 0.1."""
    return relative_error**2 / (1 + math.sqrt(max(1 - relative_error**2, 0.0)))


def spectrum(kernel: Kernel, cut: Cut, route: Route = "auto") -> Spectrum:
    """The singular values of a kernel across one cut, see `spectra`."""
    return spectra(kernel, [cut], route)[cut.name]


def spectra(kernel: Kernel, cuts: Iterable[Cut] | None = None, route: Route = "auto") -> dict[str, Spectrum]:
    """The spectrum across each cut by its name, in the order of `cuts`; default: all cuts of the kernel.

    Route "gram" takes the eigenvalues of M·Mᵀ in float64. It resolves singular values down to about 1e-8 of the
    largest, below the rounding of a float32 weight, and is several times as fast as "svd", the decomposition of M
    itself. "auto" takes "svd" for float64 weights alone. Cuts that differ in indices of one value only, as most do
    for a 1x1 kernel, are computed once.

    Raises:
        ConvpareError: a cut is not one of the kernel's.
    """
    precise = kernel.tensor.dtype == torch.float64
    wide = Kernel(kernel.tensor.double())
    values_of = _by_svd if route == "svd" or (route == "auto" and precise) else _by_gram
    trivial = {letter for letter, size in kernel.sizes.items() if size == 1}
    known: dict[tuple[frozenset[frozenset[str]], bool], Tensor] = {}
    found = {}
    for cut in cuts_of(kernel.dimensions) if cuts is None else cuts:
        _check(cut, kernel)
        blocks, rows, columns = kernel.blocks(cut)
        key = frozenset(frozenset(side) - trivial for side in (cut.left, cut.right)), blocks > 1
        if key not in known:
            known[key] = values_of(wide.unfold(cut))
        resolution = max(rows, columns) * torch.finfo(torch.float64 if precise else torch.float32).eps
        if values_of is _by_gram:
            resolution = max(resolution, math.sqrt(max(rows, columns) * torch.finfo(torch.float64).eps))
        found[cut.name] = Spectrum(cut, known[key], rows, columns, blocks, resolution)
    return found


def _by_gram(matrix: Tensor) -> Tensor:
    short = matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT
    squares: Tensor = torch.linalg.eigvalsh(lower_gram(short)).clamp_min(0)
    return squares.flatten().sort(descending=True).values.sqrt().cpu()


def _by_svd(matrix: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(matrix)
    return values.flatten().sort(descending=True).values.cpu()


def _check(cut: Cut, kernel: Kernel) -> None:
    if set(cut.left + cut.right) != set(kernel.sizes):
        raise ConvpareError(
            f"{cut} is no cut of a kernel with the indices {''.join(kernel.sizes)}; choose one of "
            + ", ".join(map(str, cuts_of(kernel.dimensions)))
        )
