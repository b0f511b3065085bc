"""Tucker decompositions: a small core between a basis for each index that is truncated."""

from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from convpare.errors import ConvpareError
from convpare.factorize.forms import (
    Fit,
    Form,
    Shape,
    adjoint,
    block_sizes,
    form,
    letters,
    reversed_links,
    reversed_shapes,
)
from convpare.factorize.subspaces import basis, energy_of, project
from convpare.redundancy.cuts import SPATIAL, Cut, Kernel

HOOI = 20  # sweeps of the forms named so
SETTLED = 1e-9  # relative growth of the core's squared norm at which the sweeps end


@form("tucker")
@dataclass(frozen=True)
class Tucker(Form):
    """Tucker decomposition in every index, ranks in the order o, i and the spatial ones; "tucker:hooi" refines it.

    The truncated higher-order SVD (De Lathauwer et al. 2000), one index after the other on what the last one left
    (Vannieuwenhoven et al. 2012); then alternating least squares, HOOI, if wanted. An index of full rank stays in the
    core. The chain is a 1x1 convolution for i, a depthwise one for each truncated spatial index with filters that all
    channels share, the core, and a 1x1 convolution for o. In a transposed convolution the shared filters follow the
    core.

    Attributes:
        sweeps: the most sweeps of HOOI; each one's error is at most the last one's.
    """

    sweeps: int = 0

    @classmethod
    def of(cls, argument: str) -> "Tucker":
        if argument not in ("", "hooi"):
            raise ConvpareError(f"{cls().name} takes no {argument!r}, only hooi; give the ranks as ranks")
        return cls(HOOI if argument else 0)

    @classmethod
    def names(cls, dimensions: int) -> tuple[str, ...]:
        return (cls().name,) if dimensions else ()

    @property
    def name(self) -> str:
        return "tucker:hooi" if self.sweeps else "tucker"

    def indices(self, kernel: Kernel) -> str:
        """What may be truncated."""
        return letters(kernel)

    def cuts(self, kernel: Kernel) -> tuple[Cut, ...]:
        if not kernel.dimensions:
            raise ConvpareError(f"a linear layer's kernel is a matrix: its form is o|i, not {self.name}")
        return tuple(_cut(kernel, letter) for letter in self.indices(kernel))

    def feasible(self, kernel: Kernel, ranks: tuple[int, ...]) -> tuple[int, ...]:
        found = self._ranks(kernel, ranks)
        while True:
            less = {c: min(found[c], most) for c, most in _limits(kernel, found).items()}
            if less == found:
                return tuple(found[c] for c in self.indices(kernel))
            found = less

    def shapes(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> tuple[Shape, ...]:
        if transposed:
            return reversed_shapes(self.shapes(adjoint(kernel), _exchanged(ranks), False))
        sizes, kept = block_sizes(kernel), self._ranks(kernel, ranks)
        spatial = SPATIAL[kernel.dimensions]
        ones, filters, channels = (1,) * kernel.dimensions, [], kept["i"]
        for letter in spatial:
            if kept[letter] < sizes[letter]:
                shape = tuple(sizes[c] if c == letter else 1 for c in spatial)
                filters.append((kernel.groups * channels, kept[letter], 1, *shape))
                channels *= kept[letter]
        core = tuple(sizes[c] if kept[c] == sizes[c] else 1 for c in spatial)
        return (
            *([(kernel.groups, kept["i"], sizes["i"], *ones)] if kept["i"] < sizes["i"] else []),
            *filters,
            (kernel.groups, kept["o"], channels, *core),
            *([(kernel.groups, sizes["o"], kept["o"], *ones)] if kept["o"] < sizes["o"] else []),
        )

    def fit(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> Fit:
        if transposed:
            found = self.fit(adjoint(kernel), _exchanged(ranks), False)
            return replace(found, links=reversed_links(found.links))
        sizes, kept = block_sizes(kernel), self._ranks(kernel, ranks)
        limits = _limits(kernel, kept)
        order = sorted(kept, key=lambda c: kept[c] == limits[c])  # such an index loses nothing after the others
        bases, core = higher_order_svd(kernel, {c: kept[c] for c in order if kept[c] < sizes[c]})
        if len(bases) > 1:
            bases, core = orthogonal_iteration(kernel, bases, core, self.sweeps)
        return Fit(_links(kernel, bases, core), energy=energy_of(core))

    def _ranks(self, kernel: Kernel, ranks: tuple[int, ...]) -> dict[str, int]:
        return {**block_sizes(kernel), **dict(zip(self.indices(kernel), ranks, strict=True))}


@form("tucker2")
@dataclass(frozen=True)
class Tucker2(Tucker):
    """Tucker decomposition in o and i alone: 1x1, the core, 1x1 (Kim et al. 2016); ranks in the order o, i."""

    @property
    def name(self) -> str:
        return "tucker2:hooi" if self.sweeps else "tucker2"

    def indices(self, kernel: Kernel) -> str:
        return "oi"


def higher_order_svd(kernel: Kernel, ranks: dict[str, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Bases (groups, size, rank) for o and i, (1, size, rank) for spatial indices, and the core.

    ‖T - T̂‖² is at most the sum over the indices of the squares that each cut alone drops at its rank.
    """
    bases, core = {}, kernel.tensor
    for letter, rank in ranks.items():
        bases[letter] = basis(Kernel(core).unfold(_cut(kernel, letter)), rank)
        core = project(core, bases[letter], _axis(kernel, letter))
    return bases, core


def orthogonal_iteration(
    kernel: Kernel, bases: dict[str, Tensor], core: Tensor, sweeps: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Higher-order orthogonal iteration: each basis in turn the best for the others, so that the core's norm grows."""
    bases, energy = dict(bases), energy_of(core)
    last = next(reversed(bases))
    for _ in range(sweeps):
        for letter in bases:
            seen = kernel.tensor
            for other in bases:
                if other != letter:
                    seen = project(seen, bases[other], _axis(kernel, other))
            bases[letter] = basis(Kernel(seen).unfold(_cut(kernel, letter)), bases[letter].shape[-1])
        core = project(seen, bases[last], _axis(kernel, last))
        before, energy = energy, energy_of(core)
        if energy <= before * (1 + SETTLED):
            break
    return bases, core


def _links(kernel: Kernel, bases: dict[str, Tensor], core: Tensor) -> tuple[Kernel, ...]:
    spatial = SPATIAL[kernel.dimensions]
    ones, channels = (1,) * kernel.dimensions, core.shape[0] * core.shape[2]
    links = []
    if "i" in bases:
        links.append(bases["i"].mT.reshape(core.shape[0], core.shape[2], -1, *ones))
    for letter in spatial:
        if letter in bases:
            size, rank = bases[letter].shape[1:]
            shape = tuple(size if c == letter else 1 for c in spatial)
            links.append(bases[letter].mT.reshape(1, rank, 1, *shape).expand(channels, -1, -1, *shape))
            channels *= rank
    filtered = [3 + n for n, c in enumerate(spatial) if c in bases]
    own = [3 + n for n, c in enumerate(spatial) if c not in bases]
    rest = tuple(1 if c in bases else core.shape[3 + n] for n, c in enumerate(spatial))
    links.append(core.permute(0, 1, 2, *filtered, *own).reshape(*core.shape[:2], channels // core.shape[0], *rest))
    if "o" in bases:
        links.append(bases["o"].reshape(*bases["o"].shape, *ones))
    return tuple(map(Kernel, links))


def _limits(kernel: Kernel, ranks: dict[str, int]) -> dict[str, int]:
    """The largest rank of each index that the others' ranks allow; groups share the basis of a spatial index."""
    size = prod(ranks.values())
    return {c: size // rank * (1 if c in "oi" else kernel.groups) for c, rank in ranks.items()}


def _cut(kernel: Kernel, letter: str) -> Cut:
    return Cut.parse(f"{letter}|{letters(kernel).replace(letter, '')}")


def _axis(kernel: Kernel, letter: str) -> int:
    return 1 + letters(kernel).index(letter)


def _exchanged(ranks: tuple[int, ...]) -> tuple[int, ...]:
    return ranks[1], ranks[0], *ranks[2:]
