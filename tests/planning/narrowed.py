"""What tests of several files ask of layers that removals made narrower."""

import numpy as np

from convpare.graph import Graph
from convpare.planning.mixed import Choices


def as_long_as_planned(graph: Graph, choices: Choices, keep: np.ndarray) -> list[int]:
    """The choices that are chains of as many layers of the narrower layer: a Tucker rank that reaches its channels, and
    so saves a layer there, is not among them."""
    out, into = (len(graph.kept(axis, keep)) for axis in (choices.layer.out, choices.layer.into))
    fits = [c.form != "tucker2" or (c.ranks[0] < out and c.ranks[1] < into) for c in choices.chains]
    return [0, *(n for n, fit in enumerate(fits, 1) if fit)]
