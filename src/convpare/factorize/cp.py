"""Canonical polyadic decomposition: a sum of products of vectors, kept from degenerating."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from operator import mul
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.factorize.forms import Fit, Form, Shape, block_sizes, form, letters
from convpare.factorize.subspaces import basis
from convpare.redundancy.cuts import SPATIAL, Cut, Kernel

RIDGE = 1e-9  # of a component's squared norm: how much a step of least squares is held back
SETTLED = 1e-4  # relative fall of the objective of the correction below which it ends

Vectors = list[Tensor]
"""For each mode (b, size, rank): the component r of block b is the outer product of the columns r."""


@dataclass(frozen=True)
class Search:
    """How the components are found.

    Attributes:
        starts: initialisations; the first from the singular vectors of the unfoldings, the others random.
        sweeps: the most sweeps of alternating least squares from each.
        tolerance: a search ends when the relative error falls by less than this share of itself in a sweep.
        seed: of the random initialisations.
        objective: what the correction minimises without more error: the sensitivity to small changes of the vectors,
            or the intensity; None for no correction.
        rounds: the most rounds of the correction.
    """

    starts: int = 2
    sweeps: int = 200
    tolerance: float = 1e-5
    seed: int = 0
    objective: Literal["sensitivity", "intensity"] | None = "sensitivity"
    rounds: int = 50

    def __post_init__(self) -> None:
        if self.starts < 1 or self.sweeps < 1 or self.objective not in (*_OBJECTIVES, None):
            raise ConvpareError(
                f"{self} cannot search; give starts and sweeps from 1, objective sensitivity, intensity or None"
            )


@form("cp")
@dataclass(frozen=True)
class Cp(Form):
    """CP decomposition of the kernel as a tensor of o, i and all spatial indices together: 1x1, depthwise, 1x1.

    Alternating least squares, then the error-preserving correction of Phan et al. (arXiv 2008.05441), because the best
    components may be huge ones that cancel. `details` has the squared norms of the components summed ("intensity"), and
    the sensitivity, both as shares of the squared norm of the kernel, before and after the correction.

    Attributes:
        separable: every spatial index on its own, such as a depthwise 3x1 and a depthwise 1x3 (Lebedev et al. 2015).
    """

    alone: ClassVar[int] = 100_000
    separable: bool = False
    search: Search = field(default_factory=Search)

    @classmethod
    def of(cls, argument: str) -> "Cp":
        if argument not in ("", "separable"):
            raise ConvpareError(f"no form 'cp:{argument}'; choose cp or cp:separable")
        return cls(argument == "separable")

    @classmethod
    def names(cls, dimensions: int) -> tuple[str, ...]:
        return ("cp", "cp:separable") if dimensions else ()

    @property
    def name(self) -> str:
        return "cp:separable" if self.separable else "cp"

    def cuts(self, kernel: Kernel) -> tuple[Cut, ...]:
        if not kernel.dimensions:
            raise ConvpareError(f"a linear layer's kernel is a matrix: its form is o|i, not {self.name}")
        rest = letters(kernel)
        return tuple(Cut.parse(f"{mode}|{''.join(c for c in rest if c not in mode)}") for mode in self._modes(kernel))

    def ranks_of_cuts(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        return (max(ranks),)

    def full_ranks(self, kernel: Kernel) -> tuple[int, ...]:
        self.cuts(kernel)
        sizes = self._sizes(kernel)
        return (prod(sizes) // max(sizes),)

    def shapes(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> tuple[Shape, ...]:
        (rank,), sizes = ranks, block_sizes(kernel)
        spatial, ones = SPATIAL[kernel.dimensions], (1,) * kernel.dimensions
        along = [tuple(sizes[c] if c in mode else 1 for c in spatial) for mode in self._modes(kernel)[2:]]
        return (
            (kernel.groups, rank, sizes["i"], *ones),
            *((kernel.groups * rank, 1, 1, *shape) for shape in along),
            (kernel.groups, sizes["o"], rank, *ones),
        )

    def fit(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> Fit:
        blocks = kernel.tensor.double().reshape(kernel.groups, *self._sizes(kernel))
        norms = blocks.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        unit = blocks / norms.reshape(-1, *[1] * (blocks.ndim - 1))
        if ranks == self.full_ranks(kernel):
            rough = vectors = balanced(exact(unit))
        else:
            rough = best_of(unit, ranks[0], self.search)
            vectors = stabilised(unit, rough, self.search)
        shares = norms.square() / norms.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        details = {
            f"{name}_{when}": float((measure(found) * shares).sum())
            for name, measure in (("intensity", intensity), ("sensitivity", sensitivity))
            for when, found in (("before", rough), ("after", vectors))
        }
        scale = norms.pow(1 / len(vectors))[:, None, None]
        out, into, *spatial = ((v * scale).to(kernel.tensor.dtype) for v in vectors)
        tensors = [into.mT, *(v.mT for v in spatial), out]
        shapes = self.shapes(kernel, ranks, transposed)
        links = tuple(Kernel(t.reshape(shape)) for t, shape in zip(tensors, shapes, strict=True))
        return Fit(links, details=details)

    def _modes(self, kernel: Kernel) -> tuple[str, ...]:
        spatial = SPATIAL[kernel.dimensions]
        return ("o", "i", *(spatial if self.separable else (spatial,)))

    def _sizes(self, kernel: Kernel) -> list[int]:
        sizes = block_sizes(kernel)
        return [prod(sizes[c] for c in mode) for mode in self._modes(kernel)]


def best_of(tensor: Tensor, rank: int, search: Search) -> Vectors:
    """For each block of (b, *sizes), of norm 1, the components with the least error from several initialisations."""
    generator = torch.Generator().manual_seed(search.seed)
    best: Vectors = []
    least = torch.tensor(torch.inf)
    for start in range(search.starts):
        vectors = _drawn(tensor, rank, generator) if start else _from_subspaces(tensor, rank, generator)
        *_, (vectors, _) = alternating(tensor, vectors, search)
        error = error_of(tensor, vectors)
        better = (error < least.to(error))[:, None, None]
        best = [torch.where(better, new, old) for new, old in zip(vectors, best or vectors, strict=True)]
        least = torch.minimum(error, least.to(error))
    return best


def alternating(tensor: Tensor, vectors: Vectors, search: Search) -> Iterator[tuple[Vectors, Tensor]]:
    """The components and the error of each block, (b,), after each sweep of alternating least squares.

    A penalty on the length of each step keeps it defined where components are nearly dependent, and lets the error only
    fall.
    """
    vectors, last = list(vectors), torch.full_like(tensor[:, 0].flatten(1)[:, 0], torch.inf)
    for _ in range(search.sweeps):
        error = last
        for mode, products in _products(tensor, vectors):
            gram = _gram(vectors, mode)
            held = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            vectors[mode] = torch.linalg.solve(gram + held * eye, (products + held * vectors[mode]).mT).mT
            square = (gram * (vectors[mode].mT @ vectors[mode])).sum((1, 2))
            error = (1 - 2 * (products * vectors[mode]).sum((1, 2)) + square).clamp_min(0).sqrt()
        vectors = balanced(vectors)
        yield list(vectors), error
        if bool((last - error <= search.tolerance * error).all()):
            return
        last = error


def stabilised(tensor: Tensor, vectors: Vectors, search: Search) -> Vectors:
    """Components with a smaller objective and no more error, by its minimisation mode after mode under that bound."""
    if search.objective is None:
        return vectors
    measure, weights = _OBJECTIVES[search.objective]
    bound, value = error_of(tensor, vectors), measure(vectors)
    for _ in range(search.rounds):
        found = list(vectors)
        for mode, products in _products(tensor, found):
            found[mode] = _smallest(products, _gram(found, mode), weights(found, mode), bound, found[mode])
        better = (error_of(tensor, found) <= bound) & (measure(found) < value)
        vectors = [torch.where(better[:, None, None], new, old) for new, old in zip(found, vectors, strict=True)]
        before, value = value, measure(vectors)
        if bool((before - value <= SETTLED * before).all()):
            break
    return vectors


def exact(tensor: Tensor) -> Vectors:
    """As many components as the product of all sizes but the largest: one for each row along that mode."""
    sizes = list(tensor.shape[1:])
    largest = sizes.index(max(sizes))
    others = [n for n in range(len(sizes)) if n != largest]
    places = torch.cartesian_prod(*(torch.arange(sizes[n], device=tensor.device) for n in others))
    vectors = dict(zip(others, (F.one_hot(p, sizes[n]).T for p, n in zip(places.T, others, strict=True)), strict=True))
    rows = tensor.movedim(1 + largest, 1).flatten(2)
    return [rows if n == largest else vectors[n].to(tensor).expand(len(tensor), -1, -1) for n in range(len(sizes))]


def balanced(vectors: Vectors) -> Vectors:
    """The same components with vectors of the same norm in all modes."""
    norms = [v.norm(dim=1, keepdim=True).clamp_min(1e-150) for v in vectors]
    mean = reduce(mul, (n.pow(1 / len(vectors)) for n in norms))
    return [v * (mean / n) for v, n in zip(vectors, norms, strict=True)]


def error_of(tensor: Tensor, vectors: Vectors) -> Tensor:
    """The norm of what is left of each block, (b,)."""
    found: Tensor = vectors[0] @ _khatri_rao(vectors[1:]).mT
    left: Tensor = torch.linalg.vector_norm(tensor.flatten(2) - found, dim=(1, 2))
    return left


def intensity(vectors: Vectors) -> Tensor:
    """The sum of the components' squared norms, (b,)."""
    return reduce(mul, _squares(vectors)).sum(1)


def sensitivity(vectors: Vectors) -> Tensor:
    """The expected squared change of the tensor per variance of small independent changes of the vectors, (b,)."""
    squares = _squares(vectors)
    return torch.stack([v.shape[1] * _others(squares, n) for n, v in enumerate(vectors)]).sum((0, 2))


def _intensity_weights(vectors: Vectors, mode: int) -> Tensor:
    return _others(_squares(vectors), mode)


def _sensitivity_weights(vectors: Vectors, mode: int) -> Tensor:
    squares = _squares(vectors)
    squares[mode] = torch.ones_like(squares[mode])
    rest = [v.shape[1] * _others(squares, n) for n, v in enumerate(vectors) if n != mode]
    return torch.stack(rest).sum(0)


_OBJECTIVES: dict[str, tuple[Callable[[Vectors], Tensor], Callable[[Vectors, int], Tensor]]] = {
    "intensity": (intensity, _intensity_weights),
    "sensitivity": (sensitivity, _sensitivity_weights),
}
"""What the correction minimises, and the weights (b, rank) with which it is Σ ω_r ‖v_r‖² in the vectors of a mode."""


def _smallest(products: Tensor, gram: Tensor, weights: Tensor, bound: Tensor, old: Tensor) -> Tensor:
    """The vectors of one mode with the least Σ ω_r ‖v_r‖² of those with an error up to `bound`; else the old ones.

    In weighted vectors they solve a ridge regression, and the ridge is the largest that the bound allows.
    """
    root = weights.sqrt().clamp_min(1e-150)[:, None]
    values, axes = torch.linalg.eigh(gram / (root.mT * root))
    seen = products / root @ axes
    energy, values = seen.square().sum(1), values.clamp_min(0)
    allowed = bound.square()[:, None] * (1 - 1e-9)

    def fits(ridge: Tensor) -> Tensor:
        kept: Tensor = energy * (values + 2 * ridge) / (values + ridge).square()
        return 1 - kept.sum(1, keepdim=True) <= allowed

    top = values[:, -1:].clamp_min(1e-150).log()
    low, high = top - 36, top + 36
    possible = fits(low.exp())
    for _ in range(60):
        middle = (low + high) / 2
        inside = fits(middle.exp())
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    new = seen / (values + low.exp())[:, None] @ axes.mT / root
    return torch.where(possible[:, None], new, old)


def _products(tensor: Tensor, vectors: Vectors) -> Iterator[tuple[int, Tensor]]:
    """Mode after mode its unfolding times the Khatri-Rao product of the others' vectors, as these are by then."""
    yield 0, tensor.flatten(2) @ _khatri_rao(vectors[1:])
    seen = (tensor.flatten(2).mT @ vectors[0]).unflatten(1, tensor.shape[2:])
    for mode in range(1, len(vectors)):
        rest = seen
        for other in reversed(range(1, len(vectors))):
            if other != mode:
                moved, own = rest.movedim(other, -2), vectors[other]
                rest = (moved * own.reshape(len(own), *[1] * (moved.ndim - 3), *own.shape[1:])).sum(-2)
        yield mode, rest


def _gram(vectors: Vectors, mode: int) -> Tensor:
    return _others([v.mT @ v for v in vectors], mode)


def _others(factors: list[Tensor], mode: int) -> Tensor:
    return reduce(mul, (f for n, f in enumerate(factors) if n != mode))


def _squares(vectors: Vectors) -> list[Tensor]:
    return [v.square().sum(1) for v in vectors]


def _khatri_rao(vectors: Vectors) -> Tensor:
    return reduce(lambda a, b: (a[:, :, None] * b[:, None]).flatten(1, 2), vectors)


def _from_subspaces(tensor: Tensor, rank: int, generator: torch.Generator) -> Vectors:
    vectors = _drawn(tensor, rank, generator)
    for mode, drawn in enumerate(vectors):
        unfolding = tensor.movedim(1 + mode, 1).flatten(2).float()
        known = min(rank, *unfolding.shape[1:])
        vectors[mode] = torch.cat([basis(unfolding, known).double(), drawn[:, :, known:]], 2)
    return vectors


def _drawn(tensor: Tensor, rank: int, generator: torch.Generator) -> Vectors:
    sizes = tensor.shape[1:]
    drawn = (torch.randn(len(tensor), n, rank, generator=generator, dtype=torch.float64) for n in sizes)
    return [(v / n**0.5).to(tensor.device) for v, n in zip(drawn, sizes, strict=True)]
