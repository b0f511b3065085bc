"""What an error of a kernel costs: its layer's output error on images, weighted by what the loss makes of it.

For a kernel T (per group: o, i and the spatial indices), H = E[x xᵀ] of what the kernel sees and F = E[g gᵀ] of the
loss's gradient at the output, both per position, the second-order estimate of what a change E of the kernel costs is
tr(F E H Eᵀ) with E unfolded as o|ihw. A form is fitted to the whitened kernel: across a cut that leaves the indices of
x on one side exactly; across others, H is taken for a product of its parts (a Kronecker product).
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.redundancy.cuts import Kernel
from convpare.redundancy.moments import Root


@dataclass(frozen=True, eq=False)
class Metric:
    """The second moments of a layer.

    Attributes:
        inputs: H, (groups, i · positions of the kernel, the same), in the order of a flattened kernel; of a transposed
            convolution (groups, i, i).
        outputs: F, (groups, o, o); None: all outputs count alike.
    """

    inputs: Tensor
    outputs: Tensor | None = None
    _roots: dict[tuple[int, ...], Root] = field(init=False, repr=False, default_factory=dict)

    @cached_property
    def outputs_root(self) -> Root | None:
        """That of F."""
        return None if self.outputs is None else Root.of(self.outputs)

    def root(self, kernel: Kernel, axes: tuple[int, ...]) -> Root:
        """That of `marginal`, kept: several cuts share it."""
        if axes not in self._roots:
            self._roots[axes] = Root.of(self.marginal(kernel, axes))
        return self._roots[axes]

    def check(self, kernel: Kernel) -> None:
        """Raises ConvpareError unless the moments are those of a layer with such a kernel."""
        groups, out, into, *spatial = kernel.tensor.shape
        sizes = (into * math.prod(spatial), into)
        fits = self.inputs.shape[0] == groups and self.inputs.shape[1] == self.inputs.shape[2] in sizes
        if not fits or (self.outputs is not None and self.outputs.shape != (groups, out, out)):
            raise ConvpareError(
                f"the second moments are {tuple(self.inputs.shape)} for a kernel of {tuple(kernel.tensor.shape)} "
                "(groups, o, i, *spatial); give those of this layer"
            )
        for moment in (self.inputs, self.outputs):
            if moment is not None and not bool(torch.isfinite(moment).all()):
                raise ConvpareError("the second moments hold NaN or infinity; give images and weights that are numbers")

    def cost(self, change: Kernel) -> float:
        """tr(F E H Eᵀ) of a change E of the kernel."""
        change = Kernel(change.tensor.double())
        if self.outputs is not None:
            return float((self.outputs_of(change) * self.outputs.double()).sum())
        rows, inputs = self._rows(change)
        return float(((rows @ inputs) * rows).sum())

    def outputs_of(self, kernel: Kernel) -> Tensor:
        """E H Eᵀ, the second moment of a kernel's outputs; (groups, o, o)."""
        rows, inputs = self._rows(kernel)
        return (rows @ inputs @ rows.mT).sum(1)

    def _rows(self, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """What makes an output of inputs of which H is known, (groups, positions, o, n); and H, (groups, 1, n, n).

        Of a transposed convolution H is of single positions.
        """
        tensor, size = kernel.tensor, self.inputs.shape[1]
        inputs = self.inputs.to(tensor.dtype)[:, None]
        if size == tensor[0, 0].numel():
            return tensor.flatten(2)[:, None], inputs
        return tensor.flatten(3).permute(0, 3, 1, 2), inputs

    def marginal(self, kernel: Kernel, axes: tuple[int, ...]) -> Tensor:
        """The second moment of what a part of the kernel sees: i and the spatial `axes`; (groups, size, size).

        Positions along the other axes are samples alike.
        """
        groups, _, into, *spatial = kernel.tensor.shape
        if self.inputs.shape[1] == into:
            eye = torch.eye(math.prod(spatial[a] for a in axes), dtype=torch.float64, device=self.inputs.device)
            return torch.stack([torch.kron(h.double(), eye) for h in self.inputs])
        both = self.inputs.double().reshape(groups, into, *spatial, into, *spatial)
        for axis in reversed(range(len(spatial))):
            if axis not in axes:
                diagonal = both.diagonal(dim1=2 + axis, dim2=2 + axis + 1 + both.ndim // 2 - 1)
                both = diagonal.mean(-1)
        size = into * math.prod(spatial[a] for a in axes)
        return both.reshape(groups, size, size)

    def spatial(self, kernel: Kernel, axes: tuple[int, ...]) -> Tensor:
        """The second moment along spatial `axes` alone, of all groups, its mean diagonal 1; (1, size, size)."""
        groups, _, into, *sizes = kernel.tensor.shape
        size = math.prod(sizes[a] for a in axes)
        both = self.marginal(kernel, axes).reshape(groups, into, size, into, size)
        moment = both.diagonal(dim1=1, dim2=3).mean((0, -1))[None]
        return moment / moment.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300)


@dataclass(frozen=True, eq=False)
class Whitening:
    """Coordinates of a kernel in which all changes cost about alike: roots of what bears o, i and the spatial axes.

    Attributes:
        with_i: the spatial axes whose correlation with i and each other counts; the others are taken by themselves.
        rest: those others, of which none is whitened where a form mixes them.
    """

    metric: Metric
    kernel: Kernel
    with_i: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()

    @cached_property
    def _roots(self) -> tuple["Root | None", Root, "Root | None"]:
        metric, kernel = self.metric, self.kernel
        return (
            metric.outputs_root,
            metric.root(kernel, self.with_i),
            Root.of(metric.spatial(kernel, self.rest)) if self.rest else None,
        )

    def whiten(self, kernel: Kernel) -> Kernel:
        o, i, rest = self._roots
        tensor = self._joint(kernel.tensor, i.root)
        tensor = tensor if o is None else along(tensor, o.root, 1)
        return Kernel(tensor if rest is None else self._along_rest(tensor, rest.root))

    def unwhiten_inputs(self, tensor: Tensor) -> Tensor:
        """Of (groups, any, i, *spatial), which bears i and all its spatial axes."""
        return self._joint(tensor, self._roots[1].inverse)

    def unwhiten_outputs(self, tensor: Tensor) -> Tensor:
        """Of (groups, o, any, *spatial)."""
        return tensor if self._roots[0] is None else along(tensor, self._roots[0].inverse, 1)

    def unwhiten_rest(self, tensor: Tensor) -> Tensor:
        """Of (groups, any, any, *spatial), which bears the rest of the spatial axes."""
        return tensor if self._roots[2] is None else self._along_rest(tensor, self._roots[2].inverse)

    def _joint(self, tensor: Tensor, matrices: Tensor) -> Tensor:
        return _along_all(tensor, matrices, (2, *(3 + a for a in self.with_i)))

    def _along_rest(self, tensor: Tensor, matrices: Tensor) -> Tensor:
        return _along_all(tensor, matrices, tuple(3 + a for a in self.rest))


def _along_all(tensor: Tensor, matrices: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Apply (groups, n, n) to several axes of (groups, ...) taken together."""
    others = [a for a in range(1, tensor.ndim) if a not in axes]
    order = [0, *axes, *others]
    moved = tensor.permute(order)
    found = along(moved.flatten(1, len(axes)), matrices, 1).reshape(moved.shape)
    return found.permute([order.index(a) for a in range(tensor.ndim)])


def along(tensor: Tensor, matrices: Tensor, axis: int) -> Tensor:
    """Apply (groups, m, n) to an axis of size n of (groups, ...)."""
    moved = tensor.movedim(axis, 1)
    found = matrices.to(moved.dtype) @ moved.flatten(2)
    return found.reshape(moved.shape[0], -1, *moved.shape[2:]).movedim(1, axis)
