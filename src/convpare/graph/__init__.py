"""Capture a network, find which of its channels are coupled, remove them, prove that the result is right."""

from convpare.graph.check import SelfCheck, culprits, self_check
from convpare.graph.mending import mends
from convpare.graph.rules import rule
from convpare.graph.structure import Frozen, Graph, Group, Layer
from convpare.graph.surgery import remove_, removed, zeroed
from convpare.graph.trace import trace

__all__ = [
    "Frozen", "Graph", "Group", "Layer", "SelfCheck", "culprits", "mends", "remove_", "removed", "rule", "self_check",
    "trace", "zeroed",
]  # fmt: skip
