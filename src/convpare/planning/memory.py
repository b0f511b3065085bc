"""Peak memory of a plan, and budgets of it: how many channels each group may keep, so that all fits at any time."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from scipy.sparse import csr_array

from convpare.errors import ConvpareError, Infeasible
from convpare.factorize.chain import Layout
from convpare.factorize.edit import Factorize, layout_in
from convpare.graph.memory import Memory
from convpare.graph.structure import Extent, Graph, Group


class Levels(Protocol):
    """Groups with the counts that each may keep, and the errors there; see `Allocation`."""

    levels: Sequence[np.ndarray]
    errors: Sequence[np.ndarray]

    @property
    def hulls(self) -> list[list[int]]: ...


def memory_in(graph: Graph) -> Memory:
    """Raises ConvpareError where the graph knows nothing of it."""
    if graph.memory is None:
        raise ConvpareError(
            f"{graph.model} was captured in parts, so its peak memory is not known; leave the budget of memory out"
        )
    return graph.memory


def peak_memory(graph: Graph, keep: np.ndarray, factorizations: Iterable[Factorize] = ()) -> int:
    """The most bytes of tensors alive at a time, for the traced inputs (see `convpare.graph.memory`), under the mask
    `keep` (channels,), with these layers as chains after that.

    Raises:
        ConvpareError: the network was captured in parts.
    """
    memory = memory_in(graph)
    sizes = memory.sizes(keep)
    alive = memory.through_time(sizes)
    for edit in factorizations:
        layer = graph.layer(edit.layer)
        layout = layout_in(graph, layer, keep, edit.form, edit.ranks)
        for (operator, element), extent in zip(memory.calls[layer.weight], layer.extents, strict=True):
            alive[operator] = memory.in_steps(sizes, operator, between(layout, extent, element))
    return round(float(alive.max(initial=0)))


def between(layout: Layout, extent: Extent, element: int) -> list[float]:
    """Bytes of the tensors between the layers of a chain, in one call of it."""
    return [
        float(element * extent.batch * math.prod(shape[:2]) * math.prod(layout.sizes_after(n, extent)))
        for n, shape in enumerate(layout.shapes[:-1])
    ]


class MemoryModel:
    """Bytes alive as a function of how many channels each group keeps.

    Exact but where an element hangs on several channels at once: there it is what the first of them alone leaves.
    """

    def __init__(self, memory: Memory, groups: Sequence[Group]) -> None:
        self.memory = memory
        starts = np.array([g.start for g in groups])
        channels = np.array([g.channels for g in groups], float)
        self._depth = max([1, *(len(b.factors) for b in memory.buffers)])
        rows, columns, fixed = [], [], np.ones(len(memory.buffers) * self._depth)
        for n, buffer in enumerate(memory.buffers):
            for k, units in enumerate(buffer.factors):
                borne = np.searchsorted(starts, units[0][units[0] >= 0], side="right") - 1
                fixed[n * self._depth + k] = (units[0] < 0).sum()
                rows.append(np.full(len(borne), n * self._depth + k))
                columns.append(borne)
        at = (np.concatenate(rows), np.concatenate(columns)) if rows else (np.zeros(0, int), np.zeros(0, int))
        slope = csr_array((np.ones(len(at[0])), at), shape=(len(fixed), len(groups)))
        slope.data /= channels[slope.indices]
        self._slope, self._fixed = slope, fixed
        self._size = np.array([b.size for b in memory.buffers])

    def sizes(self, kept: np.ndarray) -> np.ndarray:
        """Bytes of each buffer, (buffers,), when group i keeps `kept[i]` channels."""
        return np.asarray(self._size * self._counts(kept).prod(axis=1))

    def peak(self, kept: np.ndarray) -> float:
        return float(self.memory.through_time(self.sizes(kept)).max(initial=0))

    def at_the_peak(self, kept: np.ndarray) -> tuple[float, np.ndarray]:
        """The peak, and the bytes that one channel more of each group takes there, (groups,)."""
        counts = self._counts(kept)
        alive = self.memory.through_time(self._size * counts.prod(axis=1))
        worst = int(alive.argmax())
        there = np.array([b.born <= worst <= b.dies for b in self.memory.buffers])
        others = np.stack([np.delete(counts, k, axis=1).prod(axis=1) for k in range(self._depth)], axis=1)
        weights = (self._size * there)[:, None] * others
        return float(alive[worst]), np.asarray(weights.reshape(-1) @ self._slope)

    def _counts(self, kept: np.ndarray) -> np.ndarray:
        return np.asarray((self._fixed + self._slope @ kept).reshape(-1, self._depth))


def check_feasible_memory(model: MemoryModel, fewest: np.ndarray, asked: float, dense: int, hint: str) -> None:
    """Raise when even the smallest allowed network needs more than `asked` of the `dense` bytes."""
    share = model.peak(fewest) / dense
    if share > asked:
        raise Infeasible(
            f"infeasible: memory {asked:g} was asked for, at best {math.ceil(1e4 * share) / 1e4:g} can be reached with "
            f"every group at its minimum{hint}"
        )


def caps(model: MemoryModel, groups: Levels, limit: float) -> list[int]:
    """The level from which on each group may choose: with all at theirs, the peak is within the limit.

    At the worst time, the group gives channels whose error per byte is least there, vertex by vertex of the hull of
    its error; in the end levels are given back that fit, those with the largest error first. The last levels must fit.
    """
    at = [0] * len(groups.levels)

    def kept() -> np.ndarray:
        return np.array([levels[i] for levels, i in zip(groups.levels, at, strict=True)], float)

    while True:
        peak, slope = model.at_the_peak(kept())
        if peak <= limit:
            break
        steps = []
        for g, hull in enumerate(groups.hulls):
            if slope[g] > 0 and at[g] < hull[-1]:
                step = next(v for v in hull if v > at[g])
                saved = slope[g] * (groups.levels[g][at[g]] - groups.levels[g][step])
                steps.append(((groups.errors[g][step] - groups.errors[g][at[g]]) / saved, g, step))
        _, g, step = min(steps)
        at[g] = step
    for g in sorted(range(len(at)), key=lambda g: -float(groups.errors[g][at[g]])):
        while at[g]:
            at[g] -= 1
            if model.peak(kept()) > limit:
                at[g] += 1
                break
    return at
