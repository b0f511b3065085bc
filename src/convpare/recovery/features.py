"""Features that two networks share: what blocks put out, where it has one shape in both."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from convpare.modes import eval_mode
from convpare.redundancy.taps import call, suited

MOST = 4  # of the blocks that could be compared, so many, evenly spread over the depth


@dataclass(frozen=True, eq=False)
class Features:
    """Blocks whose outputs are compared.

    Attributes:
        names: of the modules, in the order in which they run.
        variances: of each one's output over images in the teacher, summed over its elements.
    """

    names: tuple[str, ...] = ()
    variances: tuple[float, ...] = ()

    @staticmethod
    def shared(teacher: nn.Module, student: nn.Module, images: Tensor, most: int = MOST) -> "Features":
        """Of the blocks (modules of modules) that run once in both networks, some whose outputs have one shape.

        Of blocks that put out the same tensor the innermost counts, and what the whole network puts out does not. A
        captured graph runs no modules, and shares nothing.
        """
        with eval_mode(teacher), eval_mode(student), torch.no_grad():
            with heard(teacher, _blocks(teacher)) as wanted:
                whole = call(teacher, suited(images, teacher))
            with heard(student, _blocks(student)) as got:
                call(student, suited(images, student))
        known: list[Tensor] = [whole] if isinstance(whole, Tensor) else []
        names = []
        for name, value in wanted.items():
            alike = name in got and got[name].shape == value.shape and value.ndim > 1
            if alike and len(value) == len(images) and not any(value is other for other in known):
                known.append(value)
                names.append(name)
        spread = {name: float(wanted[name].double().flatten(1).var(0, correction=0).sum()) for name in names}
        names = [name for name in names if 0 < spread[name] < torch.inf]
        chosen = [
            names[i] for i in sorted(set(np.linspace(0, len(names), most + 1)[1:].round().astype(int) - 1) - {-1})
        ]
        return Features(tuple(chosen), tuple(spread[name] for name in chosen))

    def error(self, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
        """The squared errors of all images as shares of the variances, the mean over the blocks."""
        each = [
            (got[name].float() - wanted[name].float()).square().sum() / variance
            for name, variance in zip(self.names, self.variances, strict=True)
        ]
        return torch.stack(each).mean()


@contextlib.contextmanager
def heard(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """What these modules put out while the model runs, in that order; nothing of those that run twice."""
    found: dict[str, Tensor] = {}
    runs: Counter[str] = Counter()
    handles = []

    def hear(name: str, output: object) -> None:
        runs[name] += 1
        if isinstance(output, Tensor) and runs[name] == 1:
            found[name] = output
        else:
            found.pop(name, None)

    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: hear(name, output)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if name and next(module.children(), None) is not None)
