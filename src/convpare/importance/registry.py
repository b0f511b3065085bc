"""Criteria that rank the channels of a group, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph.structure import Graph, Group
from convpare.redundancy.moments import Moments


@dataclass(frozen=True)
class Ranking:
    """The channels of one group in the order in which they should go, with the predicted error of each removal.

    `order` has shape (channels,); `errors` likewise, the error that each removal adds to those before it, ≥ 0.
    """

    order: np.ndarray
    errors: np.ndarray


@dataclass(frozen=True)
class Context:
    """What a criterion may look at.

    `alive` (channels,) are the channels that no earlier round removed, `only` the groups that need a ranking (None:
    all of the graph's), `known` second moments that others have measured, too.
    """

    model: nn.Module
    graph: Graph
    alive: np.ndarray
    images: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[Group, ...] | None = None
    known: Moments | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups to rank."""
        return self.graph.groups if self.only is None else self.only

    @cached_property
    def moments(self) -> Moments:
        """Second moments of the layers over the images. Raises ConvpareError if there are no images."""
        if self.images is None:
            raise ConvpareError("this criterion looks at activations and needs images: give data")
        return self.known or Moments(self.model, self.images)

    def check_options(self, *known: str) -> None:
        """Raise unless all options are among these."""
        for name in sorted(set(self.options) - set(known)):
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise ConvpareError(f"the criterion has no option {name!r}; {has}")

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by name, detached."""
        owner = self.model.get_submodule(name.rpartition(".")[0])
        found: Tensor = getattr(owner, name.rpartition(".")[2])
        return found.detach()


Rank = Callable[[Context], dict[str, Ranking]]


@dataclass(frozen=True)
class Criterion:
    """A named way to rank channels; `needs_images` says whether it looks at activations."""

    name: str
    rank: Rank
    needs_images: bool
    allocation: str  # how budgets are spread over groups unless the user says otherwise: "uniform" or "global"
    summary: str


_CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, needs_images: bool = False, allocation: str = "global") -> Callable[[Rank], Rank]:
    """Register a criterion under `name`; its first docstring line is its summary."""

    def register(rank: Rank) -> Rank:
        if name in _CRITERIA:
            raise ConvpareError(f"criterion {name!r} is registered already")
        summary = (rank.__doc__ or "").strip().splitlines()[0]
        _CRITERIA[name] = Criterion(name, rank, needs_images, allocation, summary)
        return rank

    return register


def criteria() -> dict[str, Criterion]:
    """All registered criteria by name."""
    return dict(_CRITERIA)


def get_criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        ConvpareError: there is none; the message lists those that are.
    """
    if name not in _CRITERIA:
        raise ConvpareError(f"no criterion {name!r}; choose one of {', '.join(sorted(_CRITERIA))}")
    return _CRITERIA[name]
