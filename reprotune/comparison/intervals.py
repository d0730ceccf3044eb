"""Confidence intervals of scores, of their mean over benchmarks, and of paired differences of two models."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import norm

LEVEL = 0.95
"""Coverage of every interval."""
QUANTILES = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
Z = float(norm.ppf((1 + LEVEL) / 2))
RESAMPLES = 10_000
"""Of the bootstrap, and random swaps of a test."""
DRAWN_AT_ONCE = 2**24
"""Random numbers in memory at once; it changes no result."""


def score(values: Sequence[float]) -> dict[str, float]:
    """The mean of at least two row scores, with its interval.

    Row scores from 0 to 1 get Wilson's interval (1927), which also holds for few rows and for rows that all
    score the same; for fractions it is too wide. Other row scores get the normal interval.
    """
    mean, n = float(np.mean(values)), len(values)
    if min(values) < 0 or max(values) > 1:
        error = Z * float(np.std(values, ddof=1)) / math.sqrt(n)
        return {"score": mean, "low": mean - error, "high": mean + error}
    center, half_width = mean + Z**2 / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    # rounding can put an end of the interval just past the mean, or past 0 or 1
    return {
        "score": mean,
        "low": max(0.0, min(mean, (center - half_width) / (1 + Z**2 / n))),
        "high": min(1.0, max(mean, (center + half_width) / (1 + Z**2 / n))),
    }


def mean_score(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over benchmarks, each with the same weight, with its interval.

    The interval combines those of the benchmarks, which are independent: Zou and Donner's method of variance
    estimates recovered (MOVER, https://doi.org/10.1002/sim.3095).
    """
    mean = sum(value["score"] for value in scores) / len(scores)
    below, above = (
        math.hypot(*(value["score"] - value[end] for value in scores)) / len(scores)
        for end in ("low", "high")
    )
    return {"score": mean, "low": mean - below, "high": mean + above}


def interval(strata: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    """The percentile interval of a mean difference over benchmarks, each with the same weight.

    Args:
        strata: for each benchmark, the differences of its rows, (rows,). They are resampled within it.
    """
    means = resampled([values[:, None] for values in strata], seed)[:, 0]
    low, high = np.quantile(means, QUANTILES)
    return float(low), float(high)


def share(parts: Sequence[np.ndarray], wholes: Sequence[np.ndarray], seed: int) -> dict[str, float]:
    """The share of one mean difference in another, with its percentile interval.

    Args:
        parts: for each benchmark, the differences of its rows, (rows,).
        wholes: likewise, on the same rows. A test shows their mean to be different from 0.
    """
    strata = [np.stack(pair, axis=1) for pair in zip(parts, wholes, strict=True)]
    part, whole = sum(values.mean(axis=0) for values in strata)
    means = resampled(strata, seed)
    # a share of 0 is undefined; such resamples are too rare to move a quantile
    means = means[means[:, 1] != 0]
    low, high = np.quantile(means[:, 0] / means[:, 1], QUANTILES)
    return {"share": float(part / whole), "low": float(low), "high": float(high)}


def resampled(strata: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Bootstrap means over benchmarks, (RESAMPLES, columns); a row's columns are drawn together.

    Args:
        strata: for each benchmark, (rows, columns). Few rows are distinct, so what is drawn is how often each
            distinct row occurs.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros((RESAMPLES, strata[0].shape[1]))
    for values in strata:
        distinct, counts = np.unique(values, axis=0, return_counts=True)
        for begin, end in blocks(len(counts)):
            drawn = rng.multinomial(len(values), counts / len(values), end - begin)
            means[begin:end] += drawn @ distinct / len(values) / len(strata)
    return means


def blocks(width: int) -> list[tuple[int, int]]:
    """The RESAMPLES as ranges within DRAWN_AT_ONCE, if each takes `width` random numbers."""
    size = max(1, DRAWN_AT_ONCE // width)
    return [(begin, min(begin + size, RESAMPLES)) for begin in range(0, RESAMPLES, size)]
