"""From labels to groups: classes of equal labels become removable channels, alike channels become groups."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from convpare.graph.attributes import attributes, menders
from convpare.graph.lifetimes import memory_of
from convpare.graph.memory import Memory
from convpare.graph.parts import hollow
from convpare.graph.record import Record
from convpare.graph.structure import Axis, Count, Frozen, Graph, Group, Layer, Mend, Rewrite, Shuffle


def assemble(record: Record) -> Graph:
    """Number the removable channels (units) group by group and say of the others why they stay."""
    classes = record.labels.classes()
    reasons = record.labels.frozen_reasons(classes)
    inexact = record.labels.inexact_reasons(classes)
    slots = {axis: classes[start : start + record.shapes[axis[0]][axis[1]]] for axis, start in record.slots.items()}
    unit_of, sizes = _number(slots, record.layers, reasons, inexact, len(classes))
    units = {axis: ids for axis, cls in slots.items() if ((ids := unit_of[cls]) >= 0).any()}
    why = {int(unit_of[cls]): reason for cls, reason in inexact.items()}

    def units_of(labels: Tensor) -> np.ndarray:
        return np.asarray(unit_of[classes[labels.numpy()]])

    counted = [(s, Count(units_of(s.labels), s.sign, s.offset)) for s in record.spelled]
    rewrites = [Rewrite(record.name_of(s.node), s.path, count) for s, count in counted if (count.units >= 0).any()]
    return Graph(
        model=type(record.model).__name__,
        inputs=record.inputs,
        shapes=record.shapes,
        parameters=record.parameters,
        aliases=aliases(record.model),
        units=units,
        groups=_groups(units, sizes, record.layers, why),
        layers=tuple(record.layers),
        frozen=_frozen(slots, record.layers, reasons),
        mends=tuple(Mend(name, units_of(labels), mender) for name, labels, mender in menders(record)),
        attributes=tuple(attributes(record, counted)),
        rewrites=tuple(rewrites),
        shuffles=tuple(Shuffle(n.name, units_of(labels), at.numpy()) for n, labels, at in record.shuffles),
        spared=record.spared,
        not_counted=record.not_counted,
        unreached=record.unreached,
        parts=tuple(hollow(call) for call in record.calls if call.name),
        form=record.form,
        memory=_memory(record, units_of),
    )


def _memory(record: Record, units_of: Callable[[Tensor], np.ndarray]) -> Memory | None:
    """Of a network that was captured as a whole."""
    if any(call.name for call in record.calls):
        return None
    return memory_of(record.values, units_of, record.held, record.applied)


def _number(
    slots: Mapping[Axis, np.ndarray],
    layers: Sequence[Layer],
    reasons: Mapping[int, str],
    inexact: Mapping[int, str],
    count: int,
) -> tuple[np.ndarray, list[int]]:
    """Unit of every class (-1: stays) and the size of every group.

    A class is removable when a layer produces it and nothing freezes it. Classes with the same signature (how often
    each axis bears them) form a group; signatures are compared by a random 64-bit hash, so the cost is linear.
    """
    random = np.random.default_rng(0).integers(1, 2**63, len(slots), dtype=np.uint64)
    signature = np.zeros(count, np.uint64)
    for axis_hash, cls in zip(random, slots.values(), strict=True):
        np.add.at(signature, cls, axis_hash)
    signature[list(inexact)] += np.uint64(1)
    place = np.full((count, 2), -1)  # the first layer that produces a class, and its channel there
    for number, layer in reversed(list(enumerate(layers))):
        if layer.out in slots:
            made = slots[layer.out][::-1]
            place[made] = np.stack([np.full(len(made), number), np.arange(len(made))[::-1]], axis=1)
    removable = place[:, 0] >= 0
    removable[list(reasons)] = False
    chosen = np.flatnonzero(removable)
    chosen = chosen[np.lexsort((place[chosen, 1], place[chosen, 0]))]
    _, first, group = np.unique(signature[chosen], return_index=True, return_inverse=True)
    chosen = chosen[np.argsort(first[group], kind="stable")]  # groups in the order of their first channel
    unit_of = np.full(count, -1)
    unit_of[chosen] = np.arange(len(chosen))
    sizes = np.bincount(group, minlength=len(first))[np.argsort(first)]
    return unit_of, [int(size) for size in sizes]


def _groups(
    units: Mapping[Axis, np.ndarray], sizes: Sequence[int], layers: Sequence[Layer], inexact: Mapping[int, str]
) -> tuple[Group, ...]:
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    producers: dict[int, list[str]] = defaultdict(list)
    consumers: dict[int, list[str]] = defaultdict(list)
    for layer in layers:
        for axis, listed in ((layer.out, producers), (layer.into, consumers)):
            if (ids := units.get(axis)) is not None:
                for number in np.unique(np.searchsorted(starts, ids[ids >= 0], side="right") - 1).tolist():
                    listed[number].append(layer.name)
    groups = []
    seen: Counter[str] = Counter()
    for number, size in enumerate(sizes):
        name = producers[number][0]
        seen[name] += 1
        label = name if seen[name] == 1 else f"{name}#{seen[name]}"
        start = int(starts[number])
        made, read = tuple(producers[number]), tuple(consumers[number])
        groups.append(Group(label, start, size, made, read, inexact.get(start)))
    return tuple(groups)


def _frozen(
    slots: Mapping[Axis, np.ndarray], layers: Sequence[Layer], reasons: Mapping[int, str]
) -> tuple[Frozen, ...]:
    found = []
    for layer in layers:
        counts = Counter(reasons[c] for c in slots[layer.out].tolist() if c in reasons) if layer.out in slots else {}
        found += [Frozen(layer.name, count, reason) for reason, count in counts.items()]
    return tuple(found)


def aliases(model: nn.Module) -> dict[str, str]:
    """Other names of tied parameters and buffers, and of modules that stand in the model twice → their first name."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: known for name, tensor in named if (known := first.setdefault(id(tensor), name)) != name}
