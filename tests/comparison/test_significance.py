"""P-values agree with those of statsmodels and scipy; what is called detectable is detected."""

import numpy as np
import pytest
from scipy.stats import permutation_test
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from reprotune.comparison import intervals, significance
from tests.comparison.differences import pairs


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(9, 1, 22 / 1024), (6, 0, 1 / 32), (5, 5, 1.0), (0, 0, 1.0), (121, 59, None), (3, 700, None)],
)
def test_p_is_that_of_mcnemars_exact_test(better, worse, p):
    own = significance.sign_test(pairs(better, worse, 30))
    assert own == pytest.approx(float(mcnemar([[10, better], [worse, 20]], exact=True).pvalue))
    assert p is None or own == pytest.approx(p)


def test_p_is_corrected_as_statsmodels_does():
    rng = np.random.default_rng(0)
    # each call of statsmodels' collects garbage, which takes long late in a session
    for _ in range(10):
        values = {number: float(value) for number, value in enumerate(rng.beta(0.3, 2, rng.integers(1, 20)))}
        corrected = significance.holm(values)
        assert list(corrected) == sorted(values, key=values.get)
        statsmodels = multipletests(list(values.values()), method="holm")[1]
        assert [corrected[number] for number in values] == pytest.approx(statsmodels)


def test_benchmarks_have_equal_weight_in_their_mean():
    strata = [pairs(3, 1, 6), pairs(0, 50, 950)]
    mean = significance.compared(strata, 1, 1)
    assert mean["difference"] == pytest.approx((0.2 - 0.05) / 2)
    assert (mean["better"], mean["worse"]) == (3, 51)
    pooled = significance.compared([np.concatenate(strata)], 1, 1)
    assert pooled["difference"] < 0 < mean["difference"]


@pytest.mark.parametrize(
    "strata",
    [
        [pairs(9, 1, 30)],
        [pairs(4, 3, 3), pairs(8, 2, 10)],
        [np.random.default_rng(3).normal(0.2, 1, 30), pairs(5, 1, 4)],
    ],
    ids=["one benchmark", "two", "fractions"],
)
def test_p_of_the_mean_is_that_of_swapping_models(strata):
    sizes = [len(values) for values in strata]

    def mean(values, axis=-1):
        return sum(part.mean(axis) for part in np.split(values, np.cumsum(sizes)[:-1], axis)) / len(sizes)

    scipys = permutation_test(
        (np.concatenate(strata),), mean, permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    assert significance.flip_test(strata, 1) == pytest.approx(scipys, abs=0.015)


def test_no_difference_is_none():
    assert significance.compared([np.zeros(7)], 1, 1) == {
        "difference": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p": 1.0,
        "better": 0,
        "worse": 0,
        "detectable": 6 / 7,
    }
    assert significance.compared([np.zeros(7), np.zeros(5)], 1, 1)["p"] == 1.0


@pytest.mark.parametrize("tests", [1, 15])
def test_what_is_detectable_is_detected_in_four_of_five_cases(tests):
    rng, shown, size = np.random.default_rng(4), 0, 400
    sample = rng.choice([1.0, 0.0, -1.0], size, p=[0.15, 0.7, 0.15])
    gain = significance.detectable([sample], tests)
    for _ in range(400):
        p = significance.sign_test(
            rng.choice([1.0, 0.0, -1.0], size, p=[0.15 + gain / 2, 0.7, 0.15 - gain / 2])
        )
        shown += significance.holm({0: p, **dict.fromkeys(range(1, tests), 1.0)})[0] < 0.05
    assert 0.7 < shown / 400 < 0.9


@pytest.mark.parametrize("tests", [1, 3, 15])
def test_what_is_not_detectable_cannot_be_shown(tests):
    """The corrected test shows `least` rows that all favour one model, and not one row fewer."""
    least = round(1000 * significance.detectable([np.zeros(1000)], tests))
    shown, not_shown = (significance.sign_test(pairs(rows, 0, 5)) * tests for rows in (least, least - 1))
    assert shown < 0.05 <= not_shown


def test_fractions_are_tested_by_swaps():
    """Signs are not enough: one large difference outweighs many small ones."""
    values = np.array([0.9, *[-0.01] * 20])
    assert significance.sign_test(values) < 0.001 < 0.5 < significance.p_value([values], 1)


def test_the_bound_on_memory_changes_no_p(monkeypatch):
    values = np.random.default_rng(6).normal(0.1, 1, 500)
    in_one_block = significance.flip_test([values], 1)
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 2**14)
    assert len(intervals.blocks(500)) > 1 and significance.flip_test([values], 1) == in_one_block
