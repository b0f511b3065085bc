"""Numbers that a module's forward takes from its attributes, and how they are kept true when channels go.

PyTorch's own layers are mended from the shapes of their weights. A class of yours that pads channels by a number it keeps as an
attribute is taught once:

    @convpare.graph.mends(MyPad)
    def _(module, keep):            # keep: mask of the padded output channels that stay
        module.before = int(keep[: module.before].sum())
"""

from collections.abc import Callable

import numpy as np
from torch import nn

from convpare.blocks.cifar import ZeroPadShortcut
from convpare.graph.structure import Mender

_MENDERS: dict[type[nn.Module], Mender] = {}


def mends(kind: type[nn.Module]) -> Callable[[Mender], Mender]:
    """Register how modules of class `kind` are mended after channels of their output were removed."""

    def register(mender: Mender) -> Mender:
        _MENDERS[kind] = mender
        return mender

    return register


def mender_for(module: nn.Module) -> Mender | None:
    """The mender of the module's class or of its nearest base class."""
    return next((_MENDERS[base] for base in type(module).__mro__ if base in _MENDERS), None)


@mends(ZeroPadShortcut)
def _zero_pad_shortcut(module: nn.Module, keep: np.ndarray) -> None:
    before, after = module.pad_before, module.pad_after
    module.pad_before = int(keep[:before].sum())  # type: ignore[index, assignment]
    module.pad_after = int(keep[len(keep) - after :].sum())  # type: ignore[operator, assignment]
