"""Tests of paired differences between two models: each row has one model's score minus the other's."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy.stats import binomtest, norm

from reprotune.comparison.intervals import RESAMPLES, blocks, interval

ALPHA = 0.05
"""A test shows a difference where its corrected p is below this."""
POWER = 0.8
"""Probability of showing a difference of the size `detectable`; texts say "in four of five cases"."""
Key = TypeVar("Key")


def compared(strata: Sequence[np.ndarray], seed: int, tests: int) -> dict[str, float]:
    """Compare two models on one benchmark, or in the mean over several, each with the same weight.

    Args:
        strata: for each benchmark, the first model's scores minus the second's, (rows,), at least two rows.
        tests: size of the family of tests that the p-value is corrected for.

    Returns:
        difference: the mean. low, high: its interval. p: two-sided, for no difference.
        detectable: see the function. better, worse: rows on which the first model scores higher, and lower.
    """
    low, high = interval(strata, seed)
    return {
        "difference": sum(float(values.mean()) for values in strata) / len(strata),
        "low": low,
        "high": high,
        "p": p_value(strata, seed),
        "detectable": detectable(strata, tests),
        "better": sum(int((values > 0).sum()) for values in strata),
        "worse": sum(int((values < 0).sum()) for values in strata),
    }


def p_value(strata: Sequence[np.ndarray], seed: int) -> float:
    """McNemar's exact test for one benchmark whose rows are right or wrong; random swaps otherwise."""
    if len(strata) == 1 and set(np.unique(strata[0])) <= {-1.0, 0.0, 1.0}:
        return sign_test(strata[0])
    return flip_test(strata, seed)


def sign_test(differences: np.ndarray) -> float:
    """The two-sided p of McNemar's exact test, for differences of -1, 0 or 1."""
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def flip_test(strata: Sequence[np.ndarray], seed: int) -> float:
    """The two-sided p of a permutation test: how often swapping the models gives as large a mean difference.

    They are swapped at random on each row, which flips the sign of its difference.
    """
    rng = np.random.default_rng(seed)
    observed = abs(sum(float(values.mean()) for values in strata) / len(strata))
    means = np.zeros(RESAMPLES)
    for values in strata:
        sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
        for begin, end in blocks(max(1, len(counts))):
            signs = 2 * rng.binomial(counts, 0.5, (end - begin, len(counts))) - counts
            means[begin:end] += signs @ sizes / len(values) / len(strata)
    # equal differences summed in another order can differ by rounding
    tolerance = 1e-9 * max((float(np.abs(values).max()) for values in strata), default=0.0)
    # the observed assignment is one of the permutations
    return float((1 + (np.abs(means) >= observed - tolerance).sum()) / (1 + RESAMPLES))


def detectable(strata: Sequence[np.ndarray], tests: int) -> float:
    """The smallest true difference that this many rows show with probability POWER.

    It assumes that rows vary as they do here, and that the p-value is the smallest of its family, which gets
    the strongest correction. It is at least the smallest difference that McNemar's test can show, where every
    row that differs favours the same model.
    """
    level = ALPHA / tests
    error = np.sqrt(sum(values.var(ddof=1) / len(values) for values in strata)) / len(strata)
    least_rows = 1 + math.floor(math.log2(2 / level))
    least = least_rows / max(map(len, strata)) / len(strata)
    return float(max((norm.ppf(1 - level / 2) + norm.ppf(POWER)) * error, least))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """P-values corrected for their number by Holm's step-down method (1979).

    The smallest is multiplied by their number, the next by one less, and so on. None is below the previous.
    """
    corrected: dict[Key, float] = {}
    largest = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[key] = largest
    return corrected


def shown(comparison: Mapping[str, float]) -> bool:
    """Whether the corrected test of a comparison shows a difference."""
    return comparison["holm"] < ALPHA


def can_show(comparison: Mapping[str, float]) -> bool:
    """Whether a comparison has enough rows to show any difference, the largest being 1."""
    return comparison["detectable"] <= 1
