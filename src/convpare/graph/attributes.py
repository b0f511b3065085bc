"""Numbers that a forward takes from its module's attributes: found by their values, among those that it reads.

`torch.split(x, self.sizes, 1)`, `x[:, :self.width]`, `view(b, self.num_heads, …)`: the captured graph holds the number
itself. An integer attribute of the module that ran it, with this value, which the class's code reads, is where it came
from; surgery keeps it true. A trial surgery (`probe`) then tells whether this was so.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from convpare.graph.mending import is_count, mender_for, synced_names
from convpare.graph.record import Record
from convpare.graph.structure import Attribute, Count, Mender
from convpare.graph.tracer import Spelled

NOT_FORWARD = ("__init__", "__repr__", "extra_repr", "reset_parameters", "__setstate__", "__getstate__")


def tie_attributes(record: Record) -> None:
    """Numbers that come from one attribute count channels that go together."""
    first: dict[tuple[str, str, int | None], Tensor] = {}
    for spelled in record.spelled:
        for name, index in _sources(record, spelled):
            known = first.setdefault((spelled.modules[-1], name, index), spelled.labels)
            if len(known) == len(spelled.labels):
                record.labels.unify(known, spelled.labels)
            else:  # a bound and a position
                reason = f"{spelled.where} takes a number from {name}, which counts others, too"
                record.labels.freeze(known, reason)
                record.labels.freeze(spelled.labels, reason)


def attributes(record: Record, counted: Sequence[tuple[Spelled, Count]]) -> tuple[Attribute, ...]:
    """The attributes that surgery keeps true, so that the module's forward follows the channels."""
    found: dict[tuple[str, str], Any] = {}
    modules = record.modules
    for spelled, count in counted:
        for name, index in _sources(record, spelled) if (count.units >= 0).any() else ():
            module = spelled.modules[-1]
            value = getattr(modules[module], name)
            if index is None:
                found[module, name] = count if (value >= 0) == (count.sign >= 0) else count.negative()
            else:
                found.setdefault((module, name), list(value))[index] = count
    return tuple(
        Attribute(module, name, tuple(counts) if isinstance(counts, list) else counts)
        for (module, name), counts in found.items()
    )


def menders(record: Record) -> Iterator[tuple[str, Tensor, Mender]]:
    """Modules whose class was taught (`mends`), with the labels of the axis that a number of theirs speaks of."""
    modules = record.modules
    yield from record.features
    for name, whole in {s.modules[-1]: s.whole for s in reversed(record.spelled) if s.modules}.items():
        mender = mender_for(modules[name]) if name in modules else None
        if mender is not None:
            yield name, whole, mender


def _sources(record: Record, spelled: Spelled) -> Iterator[tuple[str, int | None]]:
    """The attributes of the module around it from which a number may have come: name, and index in a list."""
    module = record.modules.get(spelled.modules[-1]) if spelled.modules and record.form != "graph" else None
    if module is None or mender_for(module) is not None:
        return
    at: Any = spelled.node.kwargs if isinstance(spelled.path[0], str) else spelled.node.args
    holder: Any = None
    for step in spelled.path:
        holder, at = at, at[step]
    for name, value in vars(module).items():
        if name in _read_names(type(module)) and name not in synced_names(module):  # type: ignore[arg-type]
            if is_count(value) and value > 1 and value == abs(at):
                yield name, None
            elif isinstance(value, list | tuple) and len(spelled.path) == 2 and list(value) == list(holder):
                yield name, int(spelled.path[1])


@cache
def _read_names(kind: type) -> frozenset[str]:
    """The attribute names that the class's methods mention, those apart that only build or print it."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base not in (nn.Module, object):
            for method, function in vars(base).items():
                if isinstance(function, FunctionType) and method not in NOT_FORWARD:
                    names |= _names_in(function.__code__)
    return frozenset(names)


def _names_in(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names_in(c) for c in code.co_consts if isinstance(c, CodeType)))
