"""Numbers that a module's forward takes from its attributes, and how they are kept true when channels go.

PyTorch's own layers are mended from the shapes of their weights, and an integer (or list of integers) that the forward
uses as it stands is found by itself. A class whose forward computes with its attributes is taught once:

    @convpare.graph.mends(MyPad, "before")
    def _(module, keep):            # keep: mask of the padded output channels that stay
        module.before = int(keep[: module.before].sum())

`numbers` reads what surgery may have changed and `set_numbers` writes it to a module built anew: this is how a saved
model comes back.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

from convpare.blocks.cifar import ZeroPadShortcut
from convpare.errors import ConvpareError
from convpare.graph.structure import Mender
from convpare.graph.sync import BATCH_NORMS

Numbers = int | list[int]
_MENDERS: dict[type[nn.Module], Mender] = {}
_NUMBERS: dict[type[nn.Module], tuple[str, ...]] = {  # class → attributes; none stands for all public integers
    nn.modules.conv._ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.PReLU: ("num_parameters",),
    nn.GroupNorm: ("num_groups", "num_channels"),
    **dict.fromkeys(BATCH_NORMS, ("num_features",)),
}


def mends(kind: type[nn.Module], *attributes: str) -> Callable[[Mender], Mender]:
    """Register how modules of class `kind` are mended after channels of their output were removed.

    Args:
        kind: the class; subclasses without a mender of their own are mended likewise.
        attributes: the integer attributes that the mender changes, which are saved with the model. Without any, all
            public integer attributes of the module are.
    """

    def register(mender: Mender) -> Mender:
        _MENDERS[kind] = mender
        _NUMBERS[kind] = attributes
        return mender

    return register


def numbers(module: nn.Module) -> dict[str, Numbers]:
    """The integer attributes of `module` that surgery may change; none for a class that is neither known nor taught.

    Raises:
        ConvpareError: an attribute that `mends` was told of is no integer of 0 or more.
    """
    found: dict[str, Numbers] = {}
    for name in _attributes(module):
        value = getattr(module, name, None)
        if not is_count(value):
            raise ConvpareError(
                f"{type(module).__name__}.{name} is {value!r}; an attribute named in convpare.graph.mends must be an "
                "integer of 0 or more."
            )
        found[name] = int(value)  # type: ignore[arg-type]
    for name in module.__dict__.get("_convpare_mended", ()):
        mended: Any = getattr(module, name)
        found[name] = int(mended) if is_count(mended) else [int(v) for v in mended]
    return found


def set_numbers(module: nn.Module, values: Mapping[str, object]) -> None:
    """Set attributes that `numbers` returned of a module of the same class; nothing is set if any is refused.

    Raises:
        ConvpareError: an attribute is none that surgery changes in this class, or a value no integer of 0 or more.
    """
    known, kind = numbers(module), type(module).__name__
    for name, value in values.items():
        found = vars(module).get(name)
        if name in known and not is_count(value) and is_count(known[name]):
            raise ConvpareError(f"{kind}.{name} is {repr(value)[:60]}; it must be an integer of 0 or more.")
        if name not in known and ((synced(module) and own(module)) or not (is_count(found) or is_counts(found))):
            raise ConvpareError(
                f"{name!r} is no number of {kind} that may be set; known: {', '.join(known) or 'none'}. "
                "If the class is yours, import the code that calls convpare.graph.mends for it."
            )
        if name not in known and not _shrinks(found, value):
            raise ConvpareError(f"{kind}.{name} is {repr(value)[:60]}; it must be as {found!r} is, and no larger.")
    for name, value in values.items():
        if name in known:
            setattr(module, name, int(value))  # type: ignore[call-overload]
        else:
            set_mended(module, name, value)


def set_mended(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute that a forward takes a number (or a list of numbers) from, and remember that it was set."""
    old = getattr(module, name)
    setattr(module, name, int(value) if is_count(value) else type(old)(int(v) for v in value))
    module.__dict__["_convpare_mended"] = tuple(dict.fromkeys((*module.__dict__.get("_convpare_mended", ()), name)))


def _shrinks(old: Any, new: Any) -> bool:
    if is_count(old):
        return is_count(new) and int(new) <= int(old)
    return (
        is_counts(new)
        and len(old) == len(new)
        and all(n <= o and (n < 0) == (o < 0) for o, n in zip(old, new, strict=True))
    )


def _attributes(module: nn.Module) -> dict[str, None]:
    kinds = [base for base in type(module).__mro__ if base in _NUMBERS]
    return dict.fromkeys(name for kind in kinds for name in _NUMBERS[kind] or _public_counts(module))


def _public_counts(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if not name.startswith("_") and is_count(value)]


def is_count(value: object) -> bool:
    """Whether it is an integer of 0 or more."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 0


def is_counts(value: object) -> bool:
    """Whether it is a list or tuple of integers of 0 or more, or -1, which leaves a size open."""
    return isinstance(value, list | tuple) and all(is_count(v) or v == -1 for v in value)


def own(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's own classes."""
    return type(module).__module__.partition(".")[0] == "torch"


def synced_names(module: nn.Module) -> frozenset[str]:
    """The numbers that surgery sets from the shapes of the module's weights."""
    kinds = [base for base in type(module).__mro__ if base in _NUMBERS and base not in _MENDERS]
    return frozenset(name for kind in kinds for name in _NUMBERS[kind])


def synced(module: nn.Module) -> bool:
    """Whether surgery sets the module's numbers from the shapes of its weights."""
    return any(base in _NUMBERS and base not in _MENDERS for base in type(module).__mro__)


def mender_for(module: nn.Module) -> Mender | None:
    """The mender of the module's class or of its nearest base class."""
    return next((_MENDERS[base] for base in type(module).__mro__ if base in _MENDERS), None)


@mends(ZeroPadShortcut, "pad_before", "pad_after")
def _zero_pad_shortcut(module: nn.Module, keep: np.ndarray) -> None:
    before, after = module.pad_before, module.pad_after
    module.pad_before = int(keep[:before].sum())  # type: ignore[assignment]
    module.pad_after = int(keep[len(keep) - after :].sum())  # type: ignore[operator, assignment]
