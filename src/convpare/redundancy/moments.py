"""Second moments of layers over images: of what their kernels see, and of how the network's output hangs on them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convpare.errors import ConvpareError
from convpare.graph.structure import Layer
from convpare.modes import eval_mode
from convpare.redundancy.gram import gram
from convpare.redundancy.patches import Geometry, add_second_moment_, columns, draw_places, split_groups
from convpare.redundancy.taps import call, module_of, run, suited

RIDGE = 1e-4
"""Relative to the mean eigenvalue: how much white noise is added to what images show, lest a root have no inverse."""


@dataclass(frozen=True)
class Sampling:
    """How many positions of feature maps are looked at.

    Attributes:
        per_unknown: output positions for each of a layer's unknowns, at random.
        least: at least so many, where there are as many.
        widest: of a layer with more unknowns only the diagonal of its second moment is taken.
        differentiated: gradients are computed on at most so many images, each of which costs three forward passes.
        seed: of the drawing of positions, and of directions.
    """

    per_unknown: int = 8
    least: int = 4096
    widest: int = 6144
    differentiated: int = 128
    seed: int = 0


SAMPLING = Sampling()


def that_run(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> list[Layer]:
    """Those of `layers` that run as modules; the weight of others is read by whoever owns them."""
    heard: set[str] = set()

    def listen(layer: Layer, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(lambda *_: heard.add(layer.name))

    _listening(model, layers, [listen], lambda: run(model, images))
    return [layer for layer in layers if layer.name in heard]


def input_moments(
    model: nn.Module, layers: Sequence[Layer], images: Tensor, sampling: Sampling = SAMPLING, batch_size: int = 64
) -> dict[str, Tensor]:
    """H = E[x xᵀ] of what each layer's kernel sees, (groups, unknowns, unknowns) float64, over sampled positions.

    Unknowns are the inputs of a group at all positions of the kernel; of a transposed convolution, at one position. Of
    a layer wider than `sampling.widest` the diagonal alone, (groups, unknowns).

    Raises:
        ConvpareError: a layer does not run as a module, or reads NaN or infinity.
    """
    inputs = _Inputs(sampling, len(images))
    _listening(model, layers, [inputs.listen], lambda: run(model, images, batch_size))
    return inputs.means(layers)


def output_moments(
    model: nn.Module, layers: Sequence[Layer], images: Tensor, sampling: Sampling = SAMPLING, batch_size: int = 32
) -> dict[str, Tensor]:
    """How the network's output hangs on each layer's: F, (groups, out_channels per group, the same) float64.

    F = E[Jᵀ J] / s of the Jacobian J of the first tensor that the model returns (n, …) by a layer's output at one
    position, the mean over images and positions; s is the variance of that tensor over the images, summed over its
    elements. So a small error e of the layer's output changes the network's by about Σ eᵀ F e over positions, as a
    share of its variance: Gauss and Newton's approximation, the Fisher information of a Gaussian, and without labels.
    The products of J with one random vector an image stand for J. No gradient of a parameter is computed.

    Raises:
        ConvpareError: a layer does not run as a module, a gradient is NaN or infinite, or the output is the same for
            all images.
    """
    outputs = _Outputs(sampling)
    shown = images[: sampling.differentiated]
    _listening(model, layers, [outputs.listen], lambda: outputs.differentiate(model, shown, batch_size))
    return outputs.means(layers)


def moments_of_both(
    model: nn.Module, layers: Sequence[Layer], images: Tensor, sampling: Sampling = SAMPLING, batch_size: int = 32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of `input_moments` and of `output_moments`; images that are differentiated run once for both.

    Raises:
        ConvpareError: as those do.
    """
    inputs, outputs = _Inputs(sampling, len(images)), _Outputs(sampling)

    def work() -> None:
        outputs.differentiate(model, images[: sampling.differentiated], batch_size)
        if len(images) > sampling.differentiated:
            run(model, images[sampling.differentiated :], batch_size)

    _listening(model, layers, [inputs.listen, outputs.listen], work)
    return inputs.means(layers), outputs.means(layers)


class _Inputs:
    """Sums over what layers read, of so many images."""

    def __init__(self, sampling: Sampling, images: int) -> None:
        self._sampling, self._images = sampling, images
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def listen(self, layer: Layer, module: nn.Module) -> RemovableHandle:
        geometry = Geometry.of_module(module)
        return module.register_forward_pre_hook(lambda _, inputs: self._hear(layer, geometry, inputs[0].detach()))

    def _hear(self, layer: Layer, geometry: Geometry, x: Tensor) -> None:
        x = x.movedim(-1, 1) if layer.kind == "linear" else x
        unknowns = x.shape[1] // layer.groups * math.prod(geometry.kernel)
        total = math.prod(geometry.outputs(tuple(x.shape[2:])) if geometry.kernel else x.shape[2:])
        share = max(self._sampling.per_unknown * unknowns, self._sampling.least) / (self._images * total)
        seen = columns(x, geometry, draw_places(total, share, self._generator), layer.groups)
        seen = seen.to(torch.promote_types(seen.dtype, torch.float32))
        diagonal = unknowns > self._sampling.widest
        if layer.name not in self._sums:
            sizes = [layer.groups, *[unknowns] * (1 if diagonal else 2)]
            self._sums[layer.name] = seen.new_zeros(sizes, dtype=torch.float64)
        if diagonal:
            self._sums[layer.name] += seen.square().sum(2)
        else:
            add_second_moment_(self._sums[layer.name], seen)
        self._counts[layer.name] += seen.shape[2]

    def means(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        return _means(layers, self._sums, self._counts, "reads")


class _Outputs:
    """Sums over the gradients at what layers put out."""

    def __init__(self, sampling: Sampling) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen: list[Tensor] = []

    def listen(self, layer: Layer, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: self._hear(layer, gradient.detach()))

        return module.register_forward_hook(hook)

    def _hear(self, layer: Layer, gradient: Tensor) -> None:
        gradient = gradient.movedim(-1, 1) if layer.kind == "linear" else gradient
        flat = split_groups(gradient.reshape(*gradient.shape[:2], -1), layer.groups)
        moment = gram(flat.to(torch.promote_types(flat.dtype, torch.float32)))
        self._sums[layer.name] = self._sums[layer.name] + moment if self._counts[layer.name] else moment.double()
        self._counts[layer.name] += flat.shape[2]

    def differentiate(self, model: nn.Module, images: Tensor, batch_size: int) -> None:
        """Run the model and differentiate its output along a random direction for each image."""
        with eval_mode(model), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            for batch in torch.split(images, batch_size):
                x = suited(batch, model).detach().clone().requires_grad_()
                out = first_tensor(call(model, x + 0))  # an operator in place must not meet a leaf
                self._seen.append(out.detach().double().flatten(1).cpu())
                direction = torch.randn(out.shape, generator=self._generator).to(out)
                torch.autograd.grad((out * direction).sum(), x)

    def means(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        shown = torch.cat(self._seen)
        variance = float(shown.var(0, correction=0).sum())
        if not 0 < variance < math.inf:
            raise ConvpareError(
                f"the variance of the model's output over {len(shown)} images is {variance}; give others"
            )
        means = _means(layers, self._sums, self._counts, "has gradients with")
        return {name: moment / variance for name, moment in means.items()}


class Moments:
    """The second moments of a model's layers over images, each measured when first asked for, and kept."""

    def __init__(self, model: nn.Module, images: Tensor, sampling: Sampling | None = None) -> None:
        self.model, self.images, self.sampling = model, images, sampling or SAMPLING
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def inputs(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Those of `input_moments`, by the layers' names."""
        return self._of(layers, self._inputs, input_moments)

    def outputs(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Those of `output_moments`, by the layers' names."""
        return self._of(layers, self._outputs, output_moments)

    def both(self, layers: Sequence[Layer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and outputs, in one go where neither is known."""
        if new := [layer for layer in layers if layer.name not in self._inputs and layer.name not in self._outputs]:
            inputs, outputs = moments_of_both(self.model, new, self.images, self.sampling)
            self._inputs |= inputs
            self._outputs |= outputs
        return self.inputs(layers), self.outputs(layers)

    def _of(
        self, layers: Sequence[Layer], known: dict[str, Tensor], measure: Callable[..., dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if missing := [layer for layer in layers if layer.name not in known]:
            known |= measure(self.model, missing, self.images, self.sampling)
        return {layer.name: known[layer.name] for layer in layers}


@dataclass(frozen=True, eq=False)
class Root:
    """R with Rᵀ R = a second moment with a ridge, (groups, n, n) float64: ‖R x‖² is what a change x costs."""

    root: Tensor

    @staticmethod
    def of(moment: Tensor) -> "Root":
        moment = moment.double()
        ridge = RIDGE * moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0) + torch.finfo(torch.float32).tiny
        ridged = moment + torch.diag_embed(ridge[:, None].expand(moment.shape[:2]))
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if not bool(failed.any()):
            return Root(lower.mT)
        values, vectors = torch.linalg.eigh(moment)  # roundings of the moment are larger than the ridge
        return Root((vectors * (values.clamp_min(0) + ridge[:, None]).sqrt()[:, None]).mT)

    @cached_property
    def inverse(self) -> Tensor:
        """R⁻¹."""
        found: Tensor = torch.linalg.inv(self.root)
        return found


def first_tensor(output: object) -> Tensor:
    """The first tensor that a model returns. Raises ConvpareError if there is none."""
    while isinstance(output, dict | list | tuple) and output:
        output = next(iter(output.values() if isinstance(output, dict) else output))
    if not isinstance(output, Tensor):
        raise ConvpareError(f"the model returns a {type(output).__name__} first; a tensor is expected")
    return output


def _listening(
    model: nn.Module, layers: Sequence[Layer], listeners: Sequence[Callable[[Layer, nn.Module], RemovableHandle]],
    work: Callable[[], None],
) -> None:  # fmt: skip
    handles: list[RemovableHandle] = []
    try:
        for layer in layers:
            handles += [listen(layer, module_of(model, layer.name)) for listen in listeners]
        work()
    finally:
        for handle in handles:
            handle.remove()


def _means(layers: Sequence[Layer], sums: dict[str, Tensor], counts: Counter[str], what: str) -> dict[str, Tensor]:
    for layer in layers:
        if not counts[layer.name] or not torch.isfinite(sums[layer.name]).all():
            raise ConvpareError(
                f"layer {layer.name!r} does not run as a module, or {what} NaN or infinite values; take l2"
            )
    return {name: moment / counts[name] for name, moment in sums.items()}
