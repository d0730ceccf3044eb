"""Tests and intervals agree with known values, and with those of statsmodels and scipy."""

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from stages import statistics


def pairs(better: int, worse: int, same: int) -> np.ndarray:
    return np.array([1.0] * better + [-1.0] * worse + [0.0] * same)


@pytest.mark.parametrize(("better", "worse", "p"), [(9, 1, 22 / 1024), (6, 0, 1 / 32), (5, 5, 1.0), (0, 0, 1.0), (121, 59, None), (3, 700, None)])
def test_p_is_that_of_mcnemars_exact_test(better, worse, p):
    found = statistics.sign_test(pairs(better, worse, 30))
    assert found == pytest.approx(float(mcnemar([[10, better], [worse, 20]], exact=True).pvalue))
    assert p is None or found == pytest.approx(p)


def test_p_is_corrected_as_statsmodels_does():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = {number: float(value) for number, value in enumerate(rng.beta(0.3, 2, rng.integers(1, 20)))}
        assert list(statistics.holm(values).keys()) == sorted(values, key=values.get)
        found = statistics.holm(values)
        assert [found[number] for number in values] == pytest.approx(multipletests(list(values.values()), method="holm")[1])


@pytest.mark.parametrize("values", [pairs(30, 12, 158), pairs(0, 3, 40), np.random.default_rng(1).normal(0.1, 1, 80)], ids=["many", "few", "fractions"])
def test_intervals_are_those_of_the_bootstrap(values):
    low, high = statistics.interval([values], 1)
    theirs = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.04 * (theirs.high - theirs.low) + 1e-9)
    assert (low, high) == statistics.interval([values], 1) and low <= values.mean() <= high


def test_intervals_hold_what_they_should_in_19_of_20_cases():
    rng, held = np.random.default_rng(2), 0
    for trial in range(400):
        strata = [rng.choice([1.0, 0.0, -1.0], size, p=[0.3, 0.5, 0.2]) for size in (60, 150)]
        low, high = statistics.interval(strata, trial)
        held += low <= 0.1 <= high
    assert 0.92 < held / 400 < 0.98


def test_benchmarks_count_alike_in_their_mean():
    strata = [pairs(3, 1, 6), pairs(0, 50, 950)]
    found = statistics.compared(strata, 1, 1)
    assert found["difference"] == pytest.approx((0.2 - 0.05) / 2) and (found["better"], found["worse"]) == (3, 51)
    together = statistics.compared([np.concatenate(strata)], 1, 1)
    assert together["difference"] < 0 < found["difference"]


def test_p_of_the_mean_is_that_of_swapping_models():
    for strata in ([pairs(9, 1, 30)], [pairs(4, 3, 3), pairs(8, 2, 10)], [np.random.default_rng(3).normal(0.2, 1, 30), pairs(5, 1, 4)]):
        size = [len(values) for values in strata]

        def mean(values, axis=-1, size=size):
            return sum(part.mean(axis) for part in np.split(values, np.cumsum(size)[:-1], axis)) / len(size)

        theirs = permutation_test((np.concatenate(strata),), mean, permutation_type="samples", n_resamples=20_000, rng=1).pvalue
        assert statistics.flip_test(strata, 1) == pytest.approx(theirs, abs=0.015)


def test_no_difference_is_none():
    assert statistics.compared([np.zeros(7)], 1, 1) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "better": 0, "worse": 0, "detectable": 6 / 7}
    assert statistics.compared([np.zeros(7), np.zeros(5)], 1, 1)["p"] == 1.0


@pytest.mark.parametrize("tests", [1, 15])
def test_what_is_detectable_is_detected_in_four_of_five_cases(tests):
    rng, shown, size = np.random.default_rng(4), 0, 400
    sample = rng.choice([1.0, 0.0, -1.0], size, p=[0.15, 0.7, 0.15])
    gain = statistics.detectable([sample], tests)
    for _ in range(400):
        p = statistics.sign_test(rng.choice([1.0, 0.0, -1.0], size, p=[0.15 + gain / 2, 0.7, 0.15 - gain / 2]))
        shown += statistics.holm({0: p, **{other: 1.0 for other in range(1, tests)}})[0] < 0.05
    assert 0.7 < shown / 400 < 0.9


@pytest.mark.parametrize("tests", [1, 3, 15])
def test_what_is_not_detectable_cannot_be_shown(tests):
    """One row more, all one way, is what the corrected test shows first."""
    least = round(1000 * statistics.detectable([np.zeros(1000)], tests))
    assert statistics.sign_test(pairs(least, 0, 5)) * tests < 0.05 <= statistics.sign_test(pairs(least - 1, 0, 5)) * tests


@pytest.mark.parametrize(("right", "n"), [(0, 12), (3, 8), (12, 12), (431, 1319)])
def test_intervals_of_scores_are_wilsons(right, n):
    found = statistics.score([1.0] * right + [0.0] * (n - right))
    assert (found["low"], found["high"]) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-9)
    assert found["low"] <= found["score"] <= found["high"]


def test_intervals_of_mean_scores_hold_what_they_should():
    """Also where single benchmarks have rows all right or all wrong."""
    rng, held, chances, sizes = np.random.default_rng(5), 0, (0.02, 0.5, 0.9), (12, 40, 25)
    for _ in range(1000):
        found = statistics.mean_score([statistics.score(rng.random(size) < chance) for chance, size in zip(chances, sizes, strict=True)])
        held += found["low"] <= np.mean(chances) <= found["high"]
    assert 0.93 < held / 1000 < 0.99
    assert statistics.mean_score([statistics.score([1.0, 0.5, 3.0])])["high"] > 1, "scores beyond 0 and 1 have normal intervals"


def test_fractions_are_tested_by_swaps():
    """The sign of a difference is not all that it says: one large one outweighs many small ones."""
    values = np.array([0.9, *[-0.01] * 20])
    assert statistics.sign_test(values) < 0.001 < 0.5 < statistics.p_value([values], 1)


def test_many_different_values_take_little_memory(monkeypatch):
    values = np.random.default_rng(6).normal(0.1, 1, 500)
    whole = statistics.interval([values], 1), statistics.flip_test([values], 1)
    monkeypatch.setattr(statistics, "AT_ONCE", 2**14)
    assert (statistics.interval([values], 1), statistics.flip_test([values], 1)) == whole
