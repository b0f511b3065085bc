"""Tensor trains, also called matrix product states: one factor an index, in any order."""

from dataclasses import dataclass
from itertools import permutations

from torch import Tensor

from convpare.errors import ConvpareError
from convpare.factorize.forms import Fit, Form, Shape, block_sizes, form, letters
from convpare.factorize.subspaces import basis, energy_of, truncate
from convpare.redundancy.cuts import SPATIAL, Cut, Kernel


@form("tt")
@dataclass(frozen=True)
class TensorTrain(Form):
    """Tensor train by TT-SVD (Oseledets 2011): the cuts between the first indices and the rest, one after the other.

    The ranks are those of the cuts, from the first. An order that begins with i and ends with o becomes a chain: 1x1,
    a convolution along each spatial index, 1x1. Of other orders there is the truncated kernel alone.
    """

    order: str

    @classmethod
    def of(cls, argument: str) -> "TensorTrain":
        if len(argument) < 3 or sorted(argument) != sorted("oi" + SPATIAL[min(len(argument) - 2, 3)]):
            raise ConvpareError(
                f"'tt:{argument}' is no tensor train; expected tt: and all indices of a convolution's kernel in any "
                "order, such as tt:ihwo"
            )
        return cls(argument)

    @classmethod
    def names(cls, dimensions: int) -> tuple[str, ...]:
        return tuple(f"tt:i{''.join(p)}o" for p in permutations(SPATIAL[dimensions])) if dimensions else ()

    @property
    def name(self) -> str:
        return f"tt:{self.order}"

    def cuts(self, kernel: Kernel) -> tuple[Cut, ...]:
        if set(self.order) != set(letters(kernel)):
            fitting = ", ".join(self.names(kernel.dimensions)) or "o|i"
            raise ConvpareError(
                f"{self.name} is no form of a kernel with the indices {''.join(kernel.sizes)}; choose one of {fitting}"
            )
        return tuple(Cut.parse(f"{self.order[:n]}|{self.order[n:]}") for n in range(1, len(self.order)))

    def feasible(self, kernel: Kernel, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if not self._has_chain:
            return ranks
        sizes, found = block_sizes(kernel), [1]
        for letter, rank in zip(self.order, ranks, strict=False):
            found.append(min(rank, found[-1] * sizes[letter]))
        return tuple(found[1:])

    def shapes(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> tuple[Shape, ...]:
        if not self._has_chain:
            raise ConvpareError(
                f"{self.name} has no chain of convolutions; choose an order that begins with i and ends with o, such "
                f"as {self.names(kernel.dimensions)[0]}, or use the truncated kernel"
            )
        sizes, spatial = block_sizes(kernel), SPATIAL[kernel.dimensions]
        ones = (1,) * kernel.dimensions
        along = [tuple(sizes[c] if c == letter else 1 for c in spatial) for letter in self.order[1:-1]]
        return (
            (kernel.groups, ranks[0], sizes["i"], *ones),
            *((kernel.groups, ranks[n + 1], ranks[n], *shape) for n, shape in enumerate(along)),
            (kernel.groups, sizes["o"], ranks[-1], *ones),
        )

    def fit(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> Fit:
        if self._has_chain:
            shapes = self.shapes(kernel, ranks, transposed)
            cores = self._cores(kernel, ranks)
            links = tuple(Kernel(c.reshape(s)) for c, s in zip(cores, shapes, strict=True))
            return Fit(links, energy=energy_of(cores[-1]))
        for cut, rank in zip(self.cuts(kernel), ranks, strict=True):
            kernel = kernel.fold(truncate(kernel.unfold(cut), rank), cut)
        return Fit((), kernel)

    @property
    def _has_chain(self) -> bool:
        return self.order[0] == "i" and self.order[-1] == "o"

    def _cores(self, kernel: Kernel, ranks: tuple[int, ...]) -> list[Tensor]:
        """(groups, rank after, rank before, size) of each index, orthonormal; of the last (groups, size, rank)."""
        sizes, groups = block_sizes(kernel), kernel.groups
        rest = kernel.tensor.permute(0, *(1 + letters(kernel).index(c) for c in self.order)).reshape(groups, 1, -1)
        cores = []
        for letter, rank in zip(self.order[:-1], ranks, strict=True):
            matrix = rest.reshape(groups, rest.shape[1] * sizes[letter], -1)
            left = basis(matrix, rank)
            cores.append(left.reshape(groups, rest.shape[1], sizes[letter], rank).permute(0, 3, 1, 2))
            rest = left.mT @ matrix
        return [*cores, rest.mT]
