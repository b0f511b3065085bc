"""One cut: the kernel's best approximation of a rank across it, as two convolutions."""

from dataclasses import dataclass

from convpare.errors import ConvpareError
from convpare.factorize.forms import (
    Fit,
    Form,
    Shape,
    adjoint,
    block_sizes,
    form,
    reversed_links,
    reversed_shapes,
)
from convpare.factorize.metric import Metric, Whitening
from convpare.factorize.subspaces import split
from convpare.redundancy.cuts import SPATIAL, Cut, Kernel, cuts_of


@form("cut")
@dataclass(frozen=True)
class TwoFactors(Form):
    """Truncated SVD across a cut (arXiv 2403.14379; Eckart and Young 1936).

    Where o and i stand on different sides, a convolution along the spatial indices beside i to χ channels, then one
    along those beside o: o|ihw and i|ohw are the channel SVD (Zhang et al. 2015), oh|iw and ow|ih the spatial SVD
    (Jaderberg et al. 2014). Where they stand together, a depthwise convolution with χ atoms that all input channels
    share, then one along the indices that are left: oi|hw is the form of decomposed filters (arXiv 2009.02386). In a
    transposed convolution the atoms come last, and all output channels share them.
    """

    cut: Cut

    @classmethod
    def of(cls, argument: str) -> "TwoFactors":
        return cls(Cut.parse(argument))

    @classmethod
    def names(cls, dimensions: int) -> tuple[str, ...]:
        return tuple(cut.name for cut in cuts_of(dimensions))

    @property
    def name(self) -> str:
        return self.cut.name

    def cuts(self, kernel: Kernel) -> tuple[Cut, ...]:
        if self.cut not in cuts_of(kernel.dimensions):
            raise ConvpareError(
                f"{self.cut} is no cut of a kernel with the indices {''.join(kernel.sizes)}; choose one of "
                + ", ".join(self.names(kernel.dimensions))
            )
        return (self.cut,)

    def shapes(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> tuple[Shape, ...]:
        if transposed and not self.cut.splits_channels:
            return reversed_shapes(self.shapes(adjoint(kernel), ranks, False))
        (rank,), sizes = ranks, block_sizes(kernel)
        first, second = self._spatial(kernel)
        if self.cut.splits_channels:
            return (kernel.groups, rank, sizes["i"], *first), (kernel.groups, sizes["o"], rank, *second)
        return (
            (kernel.groups * sizes["i"], rank, 1, *first),
            (kernel.groups, sizes["o"], sizes["i"] * rank, *second),
        )

    def fit(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool) -> Fit:
        if self.cut.splits_channels:
            return Fit(self._by_channels(kernel, *ranks))
        if transposed:
            return Fit(reversed_links(self._by_atoms(adjoint(kernel), *ranks)))
        return Fit(self._by_atoms(kernel, *ranks))

    def fit_to(self, kernel: Kernel, ranks: tuple[int, ...], transposed: bool, metric: Metric) -> Fit:
        """Optimal where o stands alone on its side; elsewhere with H taken for a product of its parts on both sides."""
        if transposed and not self.cut.splits_channels:
            raise ConvpareError(f"{self.name} of a transposed convolution cannot be fitted to activations")
        first, second = (tuple(n for n, size in enumerate(sizes) if size > 1) for sizes in self._spatial(kernel))
        with_i, rest = (first, second) if self.cut.splits_channels else (second, first)
        space = Whitening(metric, kernel, with_i, rest)
        white = space.whiten(kernel)
        if self.cut.splits_channels:
            into, out = self._by_channels(white, *ranks)
            return Fit((
                Kernel(space.unwhiten_inputs(into.tensor)),
                Kernel(space.unwhiten_rest(space.unwhiten_outputs(out.tensor))),
            ))  # fmt: skip
        atoms, mixing = self._by_atoms(white, *ranks)
        apart = mixing.tensor.unflatten(2, (-1, *ranks)).movedim(3, 1).flatten(1, 2)  # (groups, χ · o, i, *spatial)
        apart = space.unwhiten_inputs(apart).unflatten(1, (*ranks, -1)).movedim(1, 3).flatten(2, 3)
        return Fit((Kernel(space.unwhiten_rest(atoms.tensor)), Kernel(space.unwhiten_outputs(apart))))

    def _by_channels(self, kernel: Kernel, rank: int) -> tuple[Kernel, ...]:
        matrix = kernel.unfold(self.cut)
        outer, inner = split(matrix if "o" in self.cut.left else matrix.mT, rank)
        (groups, out, into), (first, second) = kernel.tensor.shape[:3], self._spatial(kernel)
        return (
            Kernel(inner.reshape(groups, rank, into, *first)),
            Kernel(outer.reshape(groups, out, *second, rank).movedim(-1, 2)),
        )

    def _by_atoms(self, kernel: Kernel, rank: int) -> tuple[Kernel, ...]:
        matrix = kernel.unfold(self.cut)
        coefficients, atoms = split(matrix if "o" in self.cut.left else matrix.mT, rank)
        (groups, out, into), (first, second) = kernel.tensor.shape[:3], self._spatial(kernel)
        shared = atoms.reshape(1, rank, 1, *first).expand(groups * into, -1, -1, *first)
        mixing = coefficients.reshape(groups, out, into, *second, rank).movedim(-1, 3).flatten(2, 3)
        return Kernel(shared), Kernel(mixing)

    def _spatial(self, kernel: Kernel) -> tuple[Shape, Shape]:
        """The spatial shapes of the two convolutions."""
        sizes = block_sizes(kernel)
        with_out = self.cut.left if "o" in self.cut.left else self.cut.right
        first = tuple(1 if c in with_out else sizes[c] for c in SPATIAL[kernel.dimensions])
        second = tuple(sizes[c] if c in with_out else 1 for c in SPATIAL[kernel.dimensions])
        return first, second
