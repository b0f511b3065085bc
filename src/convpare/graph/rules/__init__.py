"""What each operator couples, and which labels its output bears; importing this room registers all rules."""

from convpare.graph.rules import contraction, layers, movement, norms, pointwise, reductions
from convpare.graph.rules.registry import RULES, Rule, rule

__all__ = ["RULES", "Rule", "contraction", "layers", "movement", "norms", "pointwise", "reductions", "rule"]
