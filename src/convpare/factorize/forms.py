"""What a form of factorization is, and which there are: one file a form, one registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, TypeVar

from convpare.errors import ConvpareError
from convpare.factorize.metric import Metric, Whitening
from convpare.redundancy.cuts import SPATIAL, Cut, Kernel

Shape = tuple[int, ...]
"""Of a kernel: (groups, o, i, *spatial), o and i within one group."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What a form makes of a kernel.

    Attributes:
        links: the kernels of the convolutions, in the order in which they run; none where there is no such chain.
        dense: the truncated kernel, where there are no links.
        energy: its squared norm, if known and it is an orthogonal projection of the kernel.
        details: figures that the form reports.
    """

    links: tuple[Kernel, ...]
    dense: Kernel | None = None
    energy: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)


class Form(ABC):
    """A way to factorize a kernel; its fields are its options.

    Ranks are those of one group of a grouped convolution, so that all groups have the same.

    Attributes:
        alone: kernels of up to so many numbers are factorized on one CPU core: several would mostly wait for each
            other, and the bits are the same on any number of cores.
    """

    alone: ClassVar[int] = 3_000_000

    @classmethod
    @abstractmethod
    def of(cls, argument: str) -> "Form":
        """From the part of the name that follows the family and ":" (of a cut, the name itself)."""

    @classmethod
    @abstractmethod
    def names(cls, dimensions: int) -> tuple[str, ...]:
        """The names of the forms of this family that become a chain, for kernels with so many spatial dimensions."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def cuts(self, kernel: Kernel) -> tuple[Cut, ...]:
        """The cuts whose singular values tell the ranks. Raises ConvpareError if the kernel cannot take this form."""

    def ranks_of_cuts(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """The form's ranks, from one for each of its cuts."""
        return ranks

    def full_ranks(self, kernel: Kernel) -> tuple[int, ...]:
        """The ranks at which nothing is lost."""
        return tuple(min(block_shape(kernel, cut)) for cut in self.cuts(kernel))

    def feasible(self, kernel: Kernel, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """These ranks without what the other ranks make superfluous."""
        return ranks

    @abstractmethod
    def shapes(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> tuple[Shape, ...]:
        """The shapes of the links that `fit` gives. Raises ConvpareError if the form has no chain."""

    @abstractmethod
    def fit(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> Fit:
        """Factorize a kernel in float32 or float64; `ranks` are feasible, transposed that of the convolution."""

    def fit_to(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool, metric: Metric) -> Fit:
        """Factorize a kernel in float64 so that the error costs little, rather than that it is small.

        The kernel is whitened along i and o, each by itself.

        Raises:
            ConvpareError: in this form no link alone bears i, or none alone bears o.
        """
        space = Whitening(metric, kernel)
        links = self.fit(space.whiten(kernel), ranks, transposed).links
        groups, out, into = kernel.tensor.shape[:3]
        ends = [tuple(link.tensor.shape[:3]) for link in (*links[:1], *links[-1:])]
        if not ends or ends[0][::2] != (groups, into) or ends[1][:2] != (groups, out):
            raise ConvpareError(
                f"{self.name} with ranks {ranks} cannot be fitted to activations; choose cuts, tucker2, cp or tt, or "
                "factorize without images"
            )
        first = Kernel(space.unwhiten_inputs(links[0].tensor))
        links = (first, *links[1:])
        return Fit((*links[:-1], Kernel(space.unwhiten_outputs(links[-1].tensor))))


_FAMILIES: dict[str, type[Form]] = {}

F = TypeVar("F", bound=type[Form])


def form(family: str) -> Callable[[F], F]:
    """Register a class of forms, named `family` or `family:argument`."""

    def register(cls: F) -> F:
        if family in _FAMILIES:
            raise ConvpareError(f"form {family!r} is registered already")
        _FAMILIES[family] = cls
        return cls

    return register


def forms_of(dimensions: int) -> tuple[str, ...]:
    """The names of all forms that become a chain, for kernels with so many spatial dimensions, 0 (linear) to 3."""
    return tuple(name for family in _FAMILIES.values() for name in family.names(dimensions))


def get_form(name: str) -> Form:
    """The form of that name, with its default options.

    Raises:
        ConvpareError: there is none; the message lists those that are.
    """
    family, _, argument = ("cut", "", name) if "|" in name else name.partition(":")
    if family not in _FAMILIES:
        raise ConvpareError(f"no form {name!r}; for a convolution along h and w choose one of {', '.join(forms_of(2))}")
    return _FAMILIES[family].of(argument)


def letters(kernel: Kernel) -> str:
    """The indices of a kernel: o, i and the spatial ones."""
    return "oi" + SPATIAL[kernel.dimensions]


def block_sizes(kernel: Kernel) -> dict[str, int]:
    """The size of each index within one group."""
    return dict(zip(letters(kernel), kernel.tensor.shape[1:], strict=True))


def block_shape(kernel: Kernel, cut: Cut) -> tuple[int, int]:
    """Rows and columns of one block of the unfolding across a cut."""
    sizes = block_sizes(kernel)
    rows, columns = (prod(sizes[letter] for letter in side) for side in (cut.left, cut.right))
    if cut.splits_channels:
        return rows, columns
    return (rows * kernel.groups, columns) if "o" in cut.left else (rows, columns * kernel.groups)


def adjoint(kernel: Kernel) -> Kernel:
    """With o and i exchanged: what a convolution is to the transposed one."""
    return Kernel(kernel.tensor.transpose(1, 2))


def reversed_links(links: tuple[Kernel, ...]) -> tuple[Kernel, ...]:
    """The chain of the adjoint kernel."""
    return tuple(adjoint(link) for link in reversed(links))


def reversed_shapes(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The shapes of `reversed_links`."""
    return tuple((s[0], s[2], s[1], *s[3:]) for s in reversed(shapes))
