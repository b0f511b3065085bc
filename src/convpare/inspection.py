"""What a network consists of, what of it could go, and why the rest could not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from convpare.data import Data, ImageSet
from convpare.graph.capture import Inputs
from convpare.graph.probe import FOLLOWS_NOT
from convpare.graph.structure import Form, Graph
from convpare.graph.trace import trace
from convpare.importance import Context, get_criterion
from convpare.planning.cost import Count, count_graph, prunable_share
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
        graph_form: the share of the MACs that hang on removable channels in the graph form, where the module's forward
            keeps some from going; else None.
    """

    graph: Graph
    count: Count
    similar: Mapping[str, float] | None
    graph_form: float | None = None

    @property
    def prunable(self) -> float:
        """The share of the MACs that hang on channels which can be removed."""
        return prunable_share(self.graph)

    def to_json(self) -> dict[str, Any]:
        structure = self.graph.to_json()
        layers = structure.pop("layers")
        groups = structure.pop("groups")
        assert isinstance(layers, list) and isinstance(groups, list)
        costs = self.count.to_json()
        return {
            **structure,
            **self.count.total.to_json(),
            "prunable_share": {
                self.graph.form: self.prunable,
                f"{self.graph.form}_marked": prunable_share(self.graph, marked=True),
                **({} if self.graph_form is None else {"graph": self.graph_form}),
            },
            "layers": [{**layer, **costs["layers"][layer["name"]]} for layer in layers],  # type: ignore[index]
            "groups": [{**g, "similar": None if self.similar is None else self.similar[g["name"]]} for g in groups],
        }


def inspect(
    model: nn.Module,
    example_inputs: Inputs,
    data: Data | ImageSet | Tensor | None = None,
    *,
    images: int = 256,
    form: Form = "module",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Trace `model`, count it, and with images measure how similar the channels of each group are.

    Args:
        form: "module" or "graph", see `apply`.

    Raises:
        ConvpareError: the model cannot be captured, or the images do not suit it.
    """
    tell = on_progress or (lambda *_: None)
    tell("tracing", 0, 1)
    graph = trace(model, example_inputs, form=form)
    bound = form == "module" and any(FOLLOWS_NOT in row.reason for row in graph.frozen)
    graph_form = prunable_share(trace(model, example_inputs, form="graph")) if bound else None
    similar = None
    if data is not None and graph.groups:
        tell("comparing feature maps", 0, 1)
        context = Context(model, graph, graph.keep_all(), calibration_images(data, images, 0))
        rankings = get_criterion("qsfm-ssim").rank(context)
        similar = {name: float(np.mean(r.errors <= 1 - SIMILAR)) for name, r in rankings.items()}
    return Inspection(graph, count_graph(graph), similar, graph_form)
