"""Label tensors: beside every activation travels an int64 tensor that says to which channel each element belongs.

A *field* is one such tensor, kept compact: it has the activation's number of dimensions, and size 1 along every
axis where the label does not change. The axes with size > 1 are its *support*. An activation carries one field for each
axis that is coupled to something (a kernel: one for its output and one for its input channels). A removed label
takes with it all elements that bear it.

Labels are only ever made equal (`unify`) or forbidden to go (`freeze`); the classes come from one
connected-components pass at the end, so that tracing is linear in the size of the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor


def compact(labels: Tensor) -> Tensor:
    """The same field with size 1 along every axis where the label is constant."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1:
            first = labels.narrow(axis, 0, 1)
            if labels.stride(axis) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def support(labels: Tensor) -> tuple[int, ...]:
    """The axes along which a compact field varies."""
    return tuple(axis for axis, size in enumerate(labels.shape) if size > 1)


@dataclass(frozen=True)
class Value:
    """What is known of one tensor of the graph: its shape and its fields. A tensor without fields has no channels.

    Attributes:
        zero: the elements of a removed channel are zero here once its weights are zeroed, so that a sum over channels
            is the same with and without it (after a sigmoid they are not).
        name: the parameter or buffer that this is, if it is one.
    """

    shape: tuple[int, ...]
    fields: tuple[Tensor, ...] = ()
    zero: bool = False
    name: str | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def on(self, axis: int) -> tuple[Tensor, ...]:
        """The fields that vary along `axis`."""
        return tuple(f for f in self.fields if f.shape[axis % self.ndim] > 1)

    def off(self, axes: Sequence[int]) -> tuple[Tensor, ...]:
        """The fields that are constant along all of `axes`."""
        chosen = {axis % self.ndim for axis in axes}
        return tuple(f for f in self.fields if not chosen & set(support(f)))

    def like(self, shape: Sequence[int], fields: Sequence[Tensor]) -> "Value":
        """Another tensor whose removed channels are as these are."""
        return Value(tuple(shape), tuple(fields), self.zero)


@dataclass
class Labels:
    """All labels of one trace, with what was said about them."""

    count: int = 0
    _left: list[Tensor] = field(default_factory=list)
    _right: list[Tensor] = field(default_factory=list)
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    _inexact: list[tuple[Tensor, str]] = field(default_factory=list)

    def new(self, count: int) -> Tensor:
        """`count` labels that nothing else bears, shape (count,)."""
        start, self.count = self.count, self.count + count
        return torch.arange(start, start + count)

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Element by element (broadcast), the labels of `a` and `b` are the same channel."""
        a, b = torch.broadcast_tensors(a, b)
        self._left.append(a.reshape(-1))
        self._right.append(b.reshape(-1))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """These channels must stay, and why."""
        if labels.numel():
            self._frozen.append((labels.reshape(-1), reason))

    def mark_inexact(self, labels: Tensor, reason: str) -> None:
        """These channels can go, but the function of the others changes by nature (a normalisation over channels)."""
        if labels.numel():
            self._inexact.append((labels.reshape(-1), reason))

    def classes(self) -> np.ndarray:
        """The class of every label after all unifications, shape (count,)."""
        left = torch.cat(self._left).numpy() if self._left else np.empty(0, np.int64)
        right = torch.cat(self._right).numpy() if self._right else np.empty(0, np.int64)
        edges = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
        return np.asarray(connected_components(edges, directed=False)[1])

    def frozen_reasons(self, classes: np.ndarray) -> dict[int, str]:
        """Class → the first reason that was given for its staying."""
        return _first_reasons(self._frozen, classes)

    def inexact_reasons(self, classes: np.ndarray) -> dict[int, str]:
        """Class → the first reason for which its removal changes the others."""
        return _first_reasons(self._inexact, classes)


def _first_reasons(events: list[tuple[Tensor, str]], classes: np.ndarray) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for labels, reason in events:
        for cls in np.unique(classes[labels.numpy()]).tolist():
            reasons.setdefault(cls, reason)
    return reasons
