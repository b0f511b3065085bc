"""What a network consists of, what of it could go, and why the rest could not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from convpare.data import Data, ImageSet
from convpare.graph.capture import Inputs
from convpare.graph.structure import Graph
from convpare.graph.trace import trace
from convpare.importance import Context, get_criterion
from convpare.planning.cost import Count, count_graph
from convpare.planning.planner import calibration_images

SIMILAR = 0.9  # SSIM from which two feature maps count as similar


@dataclass(frozen=True)
class Inspection:
    """The structure of a network with its costs.

    Attributes:
        graph: groups, layers, frozen channels.
        count: MACs, parameters and activations by layer and in total.
        similar: with images: for each group, the share of its channels that go when of every pair of channels with an
            SSIM of 0.9 or more one is dropped; None without images.
    """

    graph: Graph
    count: Count
    similar: Mapping[str, float] | None

    def to_json(self) -> dict[str, Any]:
        structure = self.graph.to_json()
        layers = structure.pop("layers")
        groups = structure.pop("groups")
        assert isinstance(layers, list) and isinstance(groups, list)
        costs = self.count.to_json()
        return {
            **structure,
            **self.count.total.to_json(),
            "layers": [{**layer, **costs["layers"][layer["name"]]} for layer in layers],  # type: ignore[index]
            "groups": [{**g, "similar": None if self.similar is None else self.similar[g["name"]]} for g in groups],
        }


def inspect(
    model: nn.Module,
    example_inputs: Inputs,
    data: Data | ImageSet | Tensor | None = None,
    *,
    images: int = 256,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Trace `model`, count it, and with images measure how similar the channels of each group are.

    Raises:
        ConvpareError: the model cannot be captured, or the images do not suit it.
    """
    tell = on_progress or (lambda *_: None)
    tell("tracing", 0, 1)
    graph = trace(model, example_inputs)
    similar = None
    if data is not None and graph.groups:
        tell("comparing feature maps", 0, 1)
        context = Context(model, graph, graph.keep_all(), calibration_images(data, images, 0))
        rankings = get_criterion("qsfm-ssim").rank(context)
        similar = {name: float(np.mean(r.errors <= 1 - SIMILAR)) for name, r in rankings.items()}
    return Inspection(graph, count_graph(graph), similar)
