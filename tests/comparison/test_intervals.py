"""Intervals agree with those of statsmodels and scipy, and cover what they should."""

import numpy as np
import pytest
from scipy.stats import bootstrap
from statsmodels.stats.proportion import proportion_confint

from reprotune.comparison import intervals
from tests.comparison.differences import pairs


@pytest.mark.parametrize(
    "values",
    [pairs(30, 12, 158), pairs(0, 3, 40), np.random.default_rng(1).normal(0.1, 1, 80)],
    ids=["many", "few", "fractions"],
)
def test_intervals_are_those_of_the_bootstrap(values):
    low, high = intervals.interval([values], 1)
    scipys = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx(tuple(scipys), abs=0.04 * (scipys.high - scipys.low) + 1e-9)
    assert (low, high) == intervals.interval([values], 1) and low <= values.mean() <= high


def test_intervals_cover_the_true_difference_in_19_of_20_cases():
    rng, covered = np.random.default_rng(2), 0
    for trial in range(400):
        strata = [rng.choice([1.0, 0.0, -1.0], size, p=[0.3, 0.5, 0.2]) for size in (60, 150)]
        low, high = intervals.interval(strata, trial)
        covered += low <= 0.1 <= high
    assert 0.92 < covered / 400 < 0.98


@pytest.mark.parametrize(("right", "n"), [(0, 12), (3, 8), (12, 12), (431, 1319)])
def test_intervals_of_scores_are_wilsons(right, n):
    score = intervals.score([1.0] * right + [0.0] * (n - right))
    wilsons = proportion_confint(right, n, method="wilson")
    assert (score["low"], score["high"]) == pytest.approx(wilsons, abs=1e-9)
    assert score["low"] <= score["score"] <= score["high"]


def test_intervals_of_mean_scores_cover_the_true_mean():
    """Also where single benchmarks have rows all right or all wrong."""
    rng, covered, chances, sizes = np.random.default_rng(5), 0, (0.02, 0.5, 0.9), (12, 40, 25)
    for _ in range(1000):
        mean = intervals.mean_score(
            [intervals.score(rng.random(size) < chance) for chance, size in zip(chances, sizes, strict=True)]
        )
        covered += mean["low"] <= np.mean(chances) <= mean["high"]
    assert 0.93 < covered / 1000 < 0.99
    assert intervals.mean_score([intervals.score([1.0, 0.5, 3.0])])["high"] > 1, (
        "scores beyond 0 and 1 have normal intervals"
    )


def test_the_bound_on_memory_changes_no_interval(monkeypatch):
    values = np.random.default_rng(6).normal(0.1, 1, 500)
    in_one_block = intervals.interval([values], 1)
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 2**14)
    assert len(intervals.blocks(500)) > 1 and intervals.interval([values], 1) == in_one_block
