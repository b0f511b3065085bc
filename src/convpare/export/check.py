"""Whether what was exported computes what the network computes."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.graph.capture import Inputs, as_args
from convpare.modes import eval_mode
from convpare.planning.planner import calibration_images
from convpare.runtimes import first_line, tensors_of

TOLERANCE = 1e-4
"""Relative to the largest output: how far outputs may be from torch's. Float32 in another order of sums is ten to a
hundred times nearer; a weight of another network, or one batch norm that was not folded well, is further."""
BATCH = 9
"""Images in a batch, after the first, which goes alone: an odd number that no network was captured with."""

Images = Data | ImageSet | Tensor
Run = Callable[[tuple[Tensor, ...]], list[Tensor]]


@dataclass(frozen=True)
class CheckOptions:
    """How a file is compared with the network.

    Attributes:
        tolerance: see `TOLERANCE`.
        images: how many are shown to both.
        seed: of the choice of images, or of the noise in place of them.
    """

    tolerance: float = TOLERANCE
    images: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ConvpareError(f"tolerance is {self.tolerance}; expected a number above 0 and below 1, such as 1e-4")
        if self.images < 2:
            raise ConvpareError(f"images is {self.images}; a check needs 2 or more")


@dataclass(frozen=True, eq=False)
class Check:
    """Inputs in batches, and what the network puts out for them.

    Attributes:
        batches: the inputs of each call.
        outputs: the network's, of each call.
        noise: whether the inputs are noise.
    """

    options: CheckOptions
    batches: tuple[tuple[Tensor, ...], ...]
    outputs: tuple[list[Tensor], ...]
    noise: bool

    @property
    def images(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the batches."""
        return tuple(len(batch[0]) for batch in self.batches)

    def difference(self, run: Run) -> float:
        """The largest of `differences`."""
        return largest_of(self.differences(run))

    def differences(self, run: Run) -> list[float]:
        """Of each batch, the largest difference of an output, as a share of the largest output of its tensor.

        Raises:
            ConvpareError: it does not run on one of the batches, or puts out other shapes.
        """
        found = []
        for inputs in self.batches:
            try:
                found.append(run(inputs))
            except Exception as error:  # a runtime may raise anything
                raise ConvpareError(f"it does not run on a batch of {len(inputs[0])}: {first_line(error)}") from error
        return self.differences_of(found)

    def differences_of(self, found: Sequence[Sequence[Tensor]]) -> list[float]:
        """The same of outputs that are there already."""
        for expected, got in zip(self.outputs, found, strict=True):
            shapes = [[tuple(x.shape) for x in outputs] for outputs in (expected, got)]
            if shapes[0] != shapes[1]:
                raise ConvpareError(f"it puts out {shapes[1]} where torch puts out {shapes[0]}")
        scales = [max(map(_largest, outputs)) for outputs in zip(*self.outputs, strict=True)]
        return [
            largest_of(_relative(_largest(mine.double() - its.double()), scale)
                       for mine, its, scale in zip(expected, got, scales, strict=True))
            for expected, got in zip(self.outputs, found, strict=True)
        ]  # fmt: skip


def prepared(model: nn.Module, example: Inputs, images: Images | None, options: CheckOptions) -> Check:
    """Show the network images, or noise in the shapes of `example` without: one alone, then others in batches.

    Raises:
        ConvpareError: it does not run on them, or puts out no numbers.
    """
    args = as_args(example)
    batches = in_batches(_noise(args, options.seed) if images is None else _images(args, images, options))
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            outputs = tuple([x.detach().clone() for x in tensors_of(model(*inputs))] for inputs in batches)
        except Exception as error:  # the model may be anybody's, and may raise anything
            shapes = ", ".join("×".join(map(str, x.shape[1:])) for x in args)
            raise ConvpareError(
                f"{type(model).__name__} does not run on images of {shapes}: {first_line(error)}"
            ) from error
    if not outputs[0] or not all(torch.isfinite(x).all() for found in outputs for x in found):
        raise ConvpareError(f"{type(model).__name__} puts out no tensors, or NaN or infinity; nothing can be compared")
    return Check(options, batches, outputs, images is None)


def in_batches(shown: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """One alone, the others together."""
    cuts = [(0, 1), *((start, start + BATCH) for start in range(1, len(shown[0]), BATCH))]
    return tuple(tuple(x[start:stop] for x in shown) for start, stop in cuts)


def _noise(args: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1 + BATCH, *x.shape[1:], generator=generator).to(x.dtype) if x.is_floating_point()
        else x[:1].expand(1 + BATCH, *x.shape[1:]) for x in args
    ]  # fmt: skip


def _images(args: tuple[Tensor, ...], images: Images, options: CheckOptions) -> list[Tensor]:
    if len(args) != 1:
        raise ConvpareError(f"the network takes {len(args)} inputs, and images are one; leave them out")
    found = calibration_images(images, options.images, options.seed)
    if found is None or not len(found):
        raise ConvpareError("there are no images to compare on")
    if len(found) == 1:
        found = found.repeat_interleave(2, 0)
    return [found.to(args[0])]


def largest_of(numbers: Iterable[float]) -> float:
    """The largest, or NaN where there is one."""
    return float(np.max(list(numbers)))


def _relative(difference: float, scale: float) -> float:
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)


def _largest(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0


@contextmanager
def on_processor(model: nn.Module, example: Inputs) -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """The network where files are made and compared: itself on the CPU, else a copy there; in evaluation mode."""
    if any(x.device.type != "cpu" for x in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).cpu()
    with eval_mode(model), torch.random.fork_rng(devices=[]):
        yield model, tuple(x.cpu() for x in as_args(example))
