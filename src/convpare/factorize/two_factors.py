"""One cut: the kernel's best approximation of a rank across it, as two convolutions."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
from convpare.factorize.subspaces import energies, split
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
        self._check_metric(transposed)
        if self._outputs_alone:
            return Fit(self._by_outputs(kernel, ranks[0], metric))
        space = self._whitening(kernel, metric)
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

    def losses(self, kernel: Kernel, transposed: bool, metric: Metric) -> Tensor:
        """What each direction is worth, falling: `fit_to` loses the sum of those after its rank; (b, ranks)."""
        self._check_metric(transposed)
        if self._outputs_alone:
            weighing, rows = metric.outputs_root, kernel.tensor.flatten(2)
            rows = rows if weighing is None else weighing.root @ rows
            if rows.shape[1] > rows.shape[2]:  # as few outputs as make the same squares
                rows = torch.linalg.qr(rows, mode="r").R
            moment = metric.outputs_of(Kernel(rows.reshape(*rows.shape[:2], *kernel.tensor.shape[2:])))
            values: Tensor = torch.linalg.eigvalsh(moment)
            return values.clamp_min(0).flip(-1)
        white = self._whitening(kernel, metric).whiten(kernel)
        return energies(white.unfold(self.cut))

    def _check_metric(self, transposed: bool) -> None:
        if transposed and not self.cut.splits_channels:
            raise ConvpareError(f"{self.name} of a transposed convolution cannot be fitted to activations")

    @property
    def _outputs_alone(self) -> bool:
        return "o" in (self.cut.left, self.cut.right)

    def _whitening(self, kernel: Kernel, metric: Metric) -> Whitening:
        first, second = (tuple(n for n, size in enumerate(sizes) if size > 1) for sizes in self._spatial(kernel))
        return Whitening(metric, kernel, *((first, second) if self.cut.splits_channels else (second, first)))

    def _by_outputs(self, kernel: Kernel, rank: int, metric: Metric) -> tuple[Kernel, ...]:
        """The outputs' own directions: no root of H is needed."""
        (groups, out, into), spatial = kernel.tensor.shape[:3], kernel.tensor.shape[3:]
        directions = torch.linalg.eigh(self._output_moment(kernel, metric)).eigenvectors[..., -rank:].flip(-1)
        weighing = metric.outputs_root
        rows = kernel.tensor.flatten(2) if weighing is None else weighing.root @ kernel.tensor.flatten(2)
        outer = directions if weighing is None else weighing.inverse @ directions
        inner = (directions.mT @ rows).reshape(groups, rank, into, *spatial)
        return Kernel(inner), Kernel(outer.reshape(groups, out, rank, *(1 for _ in spatial)))

    def _output_moment(self, kernel: Kernel, metric: Metric) -> Tensor:
        """(groups, o, o): the second moment of the layer's outputs, weighted."""
        moment = metric.outputs_of(kernel)
        if (root := metric.outputs_root) is None:
            return moment
        return root.root @ moment @ root.root.mT

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
