"""What is measured before a budget is named: the order of the channels, the moments of the layers, their chains."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.factorize.metric import Metric
from convpare.graph.structure import Graph, Group, Layer
from convpare.graph.surgery import zeroed
from convpare.importance import Context, Criterion, Ranking
from convpare.planning.latency import NetworkTimes
from convpare.planning.layer_times import Target, cached
from convpare.planning.mixed import Choices
from convpare.planning.options import Chain, chains_of, factorizable, metrics_of
from convpare.redundancy.moments import Moments


class Statistics:
    """Of one network, for plans under any budget: measured when first asked for, and kept.

    Args:
        images: (n, …), which criteria and second moments look at; None where none are needed.
        options: the criterion's own.
        target: where the network is to run, for budgets of latency.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        criterion: Criterion,
        images: Tensor | None,
        options: Mapping[str, Any],
        target: Target = Target(),
    ) -> None:
        self.model, self.graph, self.criterion, self._target = model, graph, criterion, target
        self._images, self._options = images, options
        self._moments = None if images is None else Moments(model, images)
        self._rankings: dict[str, Ranking] = {}
        self._chains: dict[bool, dict[str, Choices]] = {}

    def rankings(self, groups: Sequence[Group]) -> dict[str, Ranking]:
        """The order in which the channels of these groups should go, by the groups' names."""
        missing = tuple(g for g in groups if g.name not in self._rankings)
        if missing:
            self._rankings |= self.ranked_after(self.graph.keep_all(), missing)
        return {g.name: self._rankings[g.name] for g in groups}

    def ranked_after(self, alive: np.ndarray, groups: Sequence[Group]) -> dict[str, Ranking]:
        """The same on the network whose channels are set to zero that are not `alive` (channels,)."""
        current = self.model if alive.all() else zeroed(self.model, self.graph, alive)
        known = self._moments if alive.all() else None
        context = Context(current, self.graph, alive, self._images, dict(self._options), tuple(groups), known)
        found = self.criterion.rank(context)
        for group in groups:
            _check_ranking(found.get(group.name), group, self.criterion.name)
        return found

    @cached_property
    def times(self) -> NetworkTimes:
        """How long the layers take where the network is to run. Kept in the user's cache."""
        return NetworkTimes(self.model, self.graph, cached(self._target, next(self.model.parameters()).device))

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """What errors of the layers cost that can be factorized, by the layers' names; see `metrics_of`."""
        assert self._moments is not None, "criteria whose errors compare with those of chains look at images"
        layers = factorizable(self.model, self.graph)
        return metrics_of(self._moments, layers, self.criterion.name == "sensitivity")

    def chains(self, timed: bool) -> dict[str, Choices]:
        """What each whole layer could become, by the layers' names; with `timed` what is fast counts, too."""
        if timed not in self._chains:
            self._chains[timed] = self.chains_after(self.graph.keep_all(), timed)
        return self._chains[timed]

    def chains_after(
        self, keep: np.ndarray, timed: bool, forms: Mapping[str, Collection[str]] | None = None
    ) -> dict[str, Choices]:
        """The same of the layers that the mask `keep` (channels,) leaves; of each these forms alone, if they are
        given.
        """
        times = self.times.of if timed else None
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        relative = self.criterion.name == "reconstruction"
        layers = [layer for layer in self.graph.layers if layer.name in self.metrics]

        def chains(x: Layer) -> list[Chain]:
            wanted = None if forms is None else forms.get(x.name, ())
            return chains_of(self.graph, x, weights[x.weight], self.metrics[x.name], keep, relative, times, wanted)

        return {x.name: Choices(x, tuple(chains(x))) for x in layers}


def _check_ranking(ranking: Ranking | None, group: Group, criterion: str) -> None:
    if ranking is None or sorted(ranking.order.tolist()) != list(range(group.channels)):
        raise ConvpareError(f"criterion {criterion} does not rank the {group.channels} channels of {group.name!r}")
    if ranking.errors.shape != (group.channels,) or not (np.isfinite(ranking.errors) & (ranking.errors >= 0)).all():
        raise ConvpareError(
            f"criterion {criterion} gives group {group.name!r} errors that are not all finite numbers of 0 or more, "
            "one a channel: do the weights contain NaN?"
        )
