"""A layer's kernel as factors, and the factors as layers."""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.factorize.chain import Layout, build, compose, is_transposed, kernel_of, layout_of
from convpare.factorize.forms import Fit, Form, Shape, get_form
from convpare.factorize.metric import Metric
from convpare.factorize.ranks import Ranks, RanksLike
from convpare.factorize.subspaces import COARSE, energy_of
from convpare.graph.structure import Extent
from convpare.modes import one_thread
from convpare.redundancy.cuts import Kernel


@dataclass(frozen=True, eq=False)
class Factors:
    """A kernel T factorized to T̂.

    Attributes:
        form: by its name.
        ranks: as the form orders them; of one group of a grouped convolution.
        relative_error: ‖T - T̂‖/‖T‖ of the kernel; 0 for a kernel of zeros.
        shape: of the kernel: (groups, o, i, *spatial), o and i within one group.
        links: the kernels of the chain's layers, in order, in the layer's dtype; none where the form has no chain.
        transposed: whether the layer is a transposed convolution.
        bias: how many parameters the layer's bias has.
        details: figures of the form, see there.
    """

    form: str
    ranks: tuple[int, ...]
    relative_error: float
    shape: Shape
    links: tuple[Kernel, ...]
    transposed: bool = False
    bias: int = 0
    details: Mapping[str, float] = field(default_factory=dict)
    dense: Kernel | None = field(default=None, repr=False)

    def kernel(self) -> Kernel:
        """T̂, in the layer's dtype."""
        if self.dense is not None:
            return self.dense
        dtype = self.links[0].tensor.dtype
        return _cast(compose(tuple(_cast(link, _working(dtype)) for link in self.links)), dtype)

    @property
    def chained(self) -> tuple[Kernel, ...]:
        """The links. Raises ConvpareError if there are none."""
        if not self.links:
            raise ConvpareError(
                f"{self.form} has no chain of convolutions; take its kernel(), or a form such as tt:ihwo that has one"
            )
        return self.links

    @property
    def layout(self) -> Layout:
        """Raises ConvpareError if the form has no chain."""
        return layout_of(self.chained, self.transposed, self.bias)

    @property
    def params(self) -> int:
        """The chain's parameters, bias included."""
        return self.layout.params

    def macs(self, extents: Iterable[Extent]) -> int:
        """The chain's multiply-accumulates for these calls of the layer, such as a graph's `Layer.extents`."""
        return self.layout.macs(extents)


def factorize(layer: nn.Module, form: str | Form, ranks: RanksLike, metric: Metric | None = None) -> Factors:
    """Factorize the kernel of a convolution or linear layer, which stays as it is.

    Args:
        form: a name, see `forms_of`, or a form with options.
        ranks: see `Ranks.parse`, or numbers.
        metric: what errors cost on images; without it the kernel's own error is made small. `details` then has
            "output_error": the cost of the error over that of losing the whole kernel.

    Raises:
        ConvpareError: the layer cannot be factorized, or the form or the ranks do not suit its kernel.
    """
    chosen, kernel = form if isinstance(form, Form) else get_form(form), kernel_of(layer)
    transposed = is_transposed(layer)
    tensor, dtype = kernel.tensor, kernel.tensor.dtype
    with torch.no_grad(), _cores(chosen, kernel):
        work = Kernel(tensor.to(_working(dtype) if metric is None else torch.float64, copy=True))
        numbers = Ranks.of(ranks).resolve(chosen, work, transposed)
        fit = (
            chosen.fit(work, numbers, transposed)
            if metric is None
            else _weighted(chosen, work, numbers, transposed, metric)
        )
        error = _relative_error(work, fit)
    return Factors(
        form=chosen.name,
        ranks=numbers,
        relative_error=error,
        shape=tuple(tensor.shape),
        links=tuple(_cast(link, dtype) for link in fit.links),
        transposed=transposed,
        bias=_bias(layer),
        details=fit.details,
        dense=None if fit.dense is None else _cast(fit.dense, dtype),
    )


def layout(layer: nn.Module, form: str | Form, ranks: RanksLike) -> Layout:
    """What `factorize` would give and what it would cost, without the factorization.

    Raises:
        ConvpareError: as `factorize`, or the form has no chain.
    """
    chosen, kernel = form if isinstance(form, Form) else get_form(form), kernel_of(layer)
    transposed = is_transposed(layer)
    with torch.no_grad(), _cores(chosen, kernel):
        numbers = Ranks.of(ranks).resolve(chosen, kernel, transposed)
    return Layout(chosen.shapes(kernel, numbers, transposed), transposed, _bias(layer))


def chain(layer: nn.Module, factors: Factors) -> nn.Sequential:
    """Plain layers that compute what `layer` computes with the kernel T̂.

    Raises:
        ConvpareError: the form has no chain, or the factors are those of a layer of another shape.
    """
    shape, links = tuple(kernel_of(layer).tensor.shape), factors.chained
    if factors.shape != shape or factors.transposed != is_transposed(layer):
        raise ConvpareError(
            f"the factors are those of a kernel (groups, o, i, *spatial) {factors.shape}, the layer's is {shape}; give "
            "the layer that was factorized"
        )
    return build(layer, links)


def _weighted(form: Form, kernel: Kernel, ranks: tuple[int, ...], transposed: bool, metric: Metric) -> Fit:
    metric.check(kernel)
    fit = form.fit_to(kernel, ranks, transposed, metric)
    whole = metric.cost(kernel)
    lost = metric.cost(Kernel(kernel.tensor - compose(fit.links).tensor))
    return replace(fit, details={**fit.details, "output_error": lost / whole if whole else 0.0})


def _cores(form: Form, kernel: Kernel) -> AbstractContextManager[None]:
    return one_thread() if kernel.tensor.numel() <= form.alone else nullcontext()


def _bias(layer: nn.Module) -> int:
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return 0 if bias is None else bias.numel()


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast(kernel: Kernel, dtype: torch.dtype) -> Kernel:
    return Kernel(kernel.tensor.to(dtype))


def _relative_error(kernel: Kernel, fit: Fit) -> float:
    total = energy_of(kernel.tensor)
    if total == 0:
        return 0.0
    if fit.energy is not None and (lost := 1 - fit.energy / total) > COARSE:
        return math.sqrt(lost)
    found = compose(fit.links) if fit.dense is None else fit.dense
    return math.sqrt(energy_of(kernel.tensor - found.tensor) / total)
