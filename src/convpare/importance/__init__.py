"""Scores that rank channels: one file a criterion, one registry."""

from convpare.importance import magnitude, qsfm, reconstruction
from convpare.importance.registry import Context, Criterion, Ranking, criteria, criterion, get_criterion

__all__ = [
    "Context", "Criterion", "Ranking", "criteria", "criterion", "get_criterion", "magnitude", "qsfm", "reconstruction",
]  # fmt: skip
