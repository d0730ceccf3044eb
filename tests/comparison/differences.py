"""Differences of two models on rows, made by hand."""

import numpy as np


def pairs(better: int, worse: int, same: int) -> np.ndarray:
    """1 for each row on which the first model is better, -1 where it is worse, 0 where they are the same."""
    return np.array([1.0] * better + [-1.0] * worse + [0.0] * same)
