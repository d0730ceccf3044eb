"""How sure scores and their differences are.

Rows of two models are paired: of each, one model's score minus the other's. Intervals of differences come from a seeded bootstrap over rows; p-values of answers that are
right or wrong are exact, others come from seeded random swaps.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import binomtest, norm

LEVEL, POWER = 0.95, 0.8
RESAMPLES = 10_000
AT_ONCE = 2**24
"""Numbers that are drawn at once: a bound on memory that changes no result."""
Z = float(norm.ppf((1 + LEVEL) / 2))


def score(values: Sequence[float]) -> dict[str, float]:
    """The mean of at least two values with its 95% interval: Wilson's for values from 0 to 1, which is exact enough for few rows and for none that differ, and is too wide
    for fractions; elsewhere the normal one."""
    mean, n = float(np.mean(values)), len(values)
    if min(values) < 0 or max(values) > 1:
        error = Z * float(np.std(values, ddof=1)) / math.sqrt(n)
        return {"score": mean, "low": mean - error, "high": mean + error}
    middle, width = mean + Z**2 / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    # rounding may put the end of an interval a hair beyond what it is of
    return {"score": mean, "low": max(0.0, min(mean, (middle - width) / (1 + Z**2 / n))), "high": min(1.0, max(mean, (middle + width) / (1 + Z**2 / n)))}


def mean_score(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over benchmarks, each with the same weight; its interval puts theirs together, which are independent (Zou and Donner's method of variance estimates
    recovered, https://doi.org/10.1002/sim.3095)."""
    mean = sum(value["score"] for value in scores) / len(scores)
    below, above = (math.hypot(*(value["score"] - value[end] for value in scores)) / len(scores) for end in ("low", "high"))
    return {"score": mean, "low": mean - below, "high": mean + above}


def compared(strata: Sequence[np.ndarray], seed: int, tests: int) -> dict[str, float]:
    """Of two models on one benchmark, or in the mean over several, each with the same weight.

    Args:
        strata: of each benchmark, (rows,), at least two, the first model's scores minus the second's.
        tests: how many there are in the family that its p-value is corrected for.

    Returns:
        difference: the mean; low and high: of its 95% interval; p: of no difference, two-sided; better and worse: rows on which the first model is so;
        detectable: see there.
    """
    low, high = interval(strata, seed)
    return {
        "difference": sum(float(values.mean()) for values in strata) / len(strata), "low": low, "high": high,
        "p": p_value(strata, seed), "detectable": detectable(strata, tests),
        "better": sum(int((values > 0).sum()) for values in strata), "worse": sum(int((values < 0).sum()) for values in strata),
    }  # fmt: skip


def p_value(strata: Sequence[np.ndarray], seed: int) -> float:
    """McNemar's exact test for one benchmark whose answers are right or wrong; else random swaps."""
    if len(strata) == 1 and set(np.unique(strata[0])) <= {-1.0, 0.0, 1.0}:
        return sign_test(strata[0])
    return flip_test(strata, seed)


def interval(strata: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    """The 95% percentile interval of the mean over benchmarks, each with the same weight; rows are drawn within their benchmark.

    Args:
        strata: of each benchmark its (rows,).
    """
    low, high = np.quantile(resampled([values[:, None] for values in strata], seed)[:, 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def share(parts: Sequence[np.ndarray], wholes: Sequence[np.ndarray], seed: int) -> dict[str, float]:
    """What part of a difference another one is, and its 95% percentile interval: both in the mean over benchmarks, on the same rows.

    Args:
        parts: of each benchmark its (rows,).
        wholes: likewise, with a difference that is more than chance.
    """
    strata = [np.stack(pair, axis=1) for pair in zip(parts, wholes, strict=True)]
    part, whole = sum(values.mean(axis=0) for values in strata)
    drawn = resampled(strata, seed)
    # what a resample without a difference would share is undefined, and so rare that it moves no quantile
    drawn = drawn[drawn[:, 1] != 0]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"share": float(part / whole), "low": float(low), "high": float(high)}


def resampled(strata: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """(resamples, columns): means over benchmarks of the means of rows that are drawn with replacement within each, all columns of a row together.

    Args:
        strata: of each benchmark its (rows, columns). How often each of the few different rows is drawn is all that counts.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros((RESAMPLES, strata[0].shape[1]))
    for values in strata:
        found, counts = np.unique(values, axis=0, return_counts=True)
        for begin, end in blocks(len(counts)):
            means[begin:end] += rng.multinomial(len(values), counts / len(values), end - begin) @ found / len(values) / len(strata)
    return means


def blocks(width: int) -> list[tuple[int, int]]:
    """Of the resamples, so many at a time as AT_ONCE allows if each takes `width` numbers."""
    size = max(1, AT_ONCE // width)
    return [(begin, min(begin + size, RESAMPLES)) for begin in range(0, RESAMPLES, size)]


def sign_test(differences: np.ndarray) -> float:
    """Two-sided McNemar's exact test, of differences that are -1, 0 or 1."""
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def flip_test(strata: Sequence[np.ndarray], seed: int) -> float:
    """Two-sided p of no difference in the mean over benchmarks: how often it is as large when the two models change places on rows at random."""
    rng = np.random.default_rng(seed)
    found = abs(sum(float(values.mean()) for values in strata) / len(strata))
    drawn = np.zeros(RESAMPLES)
    for values in strata:
        sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
        for begin, end in blocks(max(1, len(counts))):
            drawn[begin:end] += (2 * rng.binomial(counts, 0.5, (end - begin, len(counts))) - counts) @ sizes / len(values) / len(strata)
    # what was found is one of the ways; a hair for what another order of sums makes of the same
    hair = 1e-9 * max((float(np.abs(values).max()) for values in strata), default=0.0)
    return float((1 + (np.abs(drawn) >= found - hair).sum()) / (1 + RESAMPLES))


def detectable(strata: Sequence[np.ndarray], tests: int) -> float:
    """The smallest true difference in the mean over benchmarks that as many rows show in four of five cases, if they differ as often as here and the p-value must
    pass the correction for so many tests as the smallest of them; at least, what McNemar's test can show at all: so many rows, all one way."""
    level = (1 - LEVEL) / tests
    error = np.sqrt(sum(values.var(ddof=1) / len(values) for values in strata)) / len(strata)
    least = 1 + math.floor(math.log2(2 / level))
    return float(max((norm.ppf(1 - level / 2) + norm.ppf(POWER)) * error, least / max(map(len, strata)) / len(strata)))


def holm(values: Mapping[tuple, float]) -> dict[tuple, float]:
    """P-values, corrected for how many there are (Holm, 1979): the smallest times their number, the next times one less, none smaller than the one before it."""
    found, largest = {}, 0.0
    for rank, (key, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(values) - rank)))
        found[key] = largest
    return found


def shown(value: Mapping[str, float]) -> bool:
    """Whether a comparison's test shows a difference, corrected for the number of tests."""
    return value["holm"] < 1 - LEVEL


def claim(value: Mapping[str, float]) -> str:
    """What may be said of a comparison."""
    if not shown(value):
        return f"shows no difference ({text(value)}; what would have shown: {detectable_text(value)})"
    return f"{'rose' if value['difference'] > 0 else 'fell'} ({text(value)})"


def text(value: Mapping[str, float]) -> str:
    """In percentage points: the difference, its interval and the corrected p."""
    return f"{points(value)} p {p_text(value['holm'])}"


def points(value: Mapping[str, float]) -> str:
    """The difference with its interval; where no row differs there is none."""
    difference, low, high = (percent(value[key]) for key in ("difference", "low", "high"))
    return f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]" if value["better"] or value["worse"] else f"{difference:+.1f}"


def percent(value: float) -> float:
    # 0.2875 is 28.75 percent, which binary floats make a little less
    return round(100 * value, 6)


def percents(value: Mapping[str, float]) -> str:
    """A score with its interval."""
    return f"{percent(value['score']):.1f} [{percent(value['low']):.1f}, {percent(value['high']):.1f}]"


def detectable_text(value: Mapping[str, float]) -> str:
    return f"{100 * value['detectable']:.1f} points" if value["detectable"] <= 1 else "nothing, of so few rows"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
