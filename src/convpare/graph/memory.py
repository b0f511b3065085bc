"""Peak memory: the tensors that are alive while the captured operators run one after the other.

What a runtime needs that frees a tensor after its last use (onnxruntime, a compiled graph): inputs and outputs of the
network included, views counted with what they look at; weights, buffers and an operator's own workspace not.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from convpare.graph.units import staying


@dataclass(frozen=True)
class Buffer:
    """A block of memory that an operator fills.

    Attributes:
        size: bytes with one channel along each factor.
        factors: of independent axes, the units of the elements along them, (conditions, elements), -1 where fixed: an
            element stays if all its units do.
        born, dies: the operators, by number, that fill it and that read it last.
    """

    size: float
    factors: tuple[np.ndarray, ...]
    born: int
    dies: int

    def bytes(self, keep: np.ndarray) -> float:
        """Under the mask `keep` (channels,)."""
        return self.size * float(np.prod([staying(units, keep).all(0).sum() for units in self.factors]))


@dataclass(frozen=True)
class Memory:
    """All buffers of a network, for the example inputs.

    Attributes:
        operators: how many there are.
        calls: of each weight's layer, in the order of its extents, the operators that apply it, by number, and the
            bytes of an element there.
    """

    operators: int
    buffers: tuple[Buffer, ...]
    calls: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def alive(self, keep: np.ndarray) -> np.ndarray:
        """Bytes alive while each operator runs, (operators,), under the mask `keep` (channels,)."""
        return self.through_time(self.sizes(keep))

    def peak(self, keep: np.ndarray) -> int:
        """The most bytes alive at a time."""
        return round(float(self.alive(keep).max(initial=0)))

    def sizes(self, keep: np.ndarray) -> np.ndarray:
        """Bytes of each buffer, (buffers,)."""
        return np.array([buffer.bytes(keep) for buffer in self.buffers])

    def in_steps(self, sizes: np.ndarray, operator: int, between: Sequence[float]) -> float:
        """The most bytes alive while several operators do what one did, with tensors of so many bytes between them.

        Args:
            sizes: of the buffers, (buffers,).
        """
        made = float(sizes[self._born == operator].sum())
        read_last = float(sizes[(self._dies == operator) & (self._born < operator)].sum())
        others = float(self.through_time(sizes)[operator]) - made - read_last
        return others + max(a + b for a, b in itertools.pairwise([read_last, *between, made]))

    def through_time(self, sizes: np.ndarray) -> np.ndarray:
        """From bytes of each buffer (buffers,) to bytes alive, (operators,)."""
        steps = np.zeros(self.operators + 1)
        np.add.at(steps, self._born, sizes)
        np.add.at(steps, self._dies + 1, -sizes)
        return np.asarray(steps.cumsum()[:-1])

    @cached_property
    def _born(self) -> np.ndarray:
        return np.array([b.born for b in self.buffers], int)

    @cached_property
    def _dies(self) -> np.ndarray:
        return np.array([b.dies for b in self.buffers], int)
