"""Units: the removable channels of a network, numbered group by group; -1 where something stays."""

import numpy as np


def staying(units: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Which of `units` stay under the mask `keep` (channels,); -1 always does."""
    return (units < 0) | keep[units] if len(keep) else units < 0
