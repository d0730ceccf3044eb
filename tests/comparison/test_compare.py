"""Known scores give the known summary."""

import pytest

from reprotune.comparison import scores
from reprotune.records import read_json
from stages import compare
from tests.comparison.cells import summarize, with_benchmarks, write_scores

RISING = {"base": [1, 0, 0, 0], "sft": [1, 1, 0, 0], "dpo": [1, 1, 1, 0]}
ONLY_DPO = {"base": [1, 0], "sft": [1, 0], "dpo": [1, 1]}


def test_known_samples_give_known_differences(tmp_path):
    write_scores(tmp_path, "a", RISING)
    write_scores(tmp_path, "b", ONLY_DPO)
    summary = summarize(with_benchmarks("a", "b"), tmp_path)
    a, b, mean = summary["all"].values()
    assert (a["n"], b["n"], mean["n"]) == (4, 2, 6)
    # Wilson's interval of 2 in 4
    assert a["sft"] == {
        "score": 0.5,
        "low": pytest.approx(0.1500, abs=1e-4),
        "high": pytest.approx(0.8500, abs=1e-4),
    }
    assert [a["sft_vs_base"][key] for key in ("difference", "better", "worse", "p")] == [0.25, 1, 0, 1.0]
    assert b["sft_vs_base"] == {
        "difference": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p": 1.0,
        "holm": 1.0,
        "better": 0,
        "worse": 0,
        "detectable": 4.0,
    }
    assert [mean[model]["score"] for model in ("base", "sft", "dpo")] == [0.375, 0.5, 0.875]
    assert [mean[label]["difference"] for label in scores.COMPARISONS] == [0.125, 0.375, 0.5]
    assert "share_of_gain" not in summary, "of six rows, no gain is shown"
    bars = read_json(tmp_path / "scores.json")
    assert len(bars) == 9 and {row["model"] for row in bars} == {"base", "sft", "dpo"}
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert len(lines) == 5 and lines[2].startswith("| a | 4 | 25.0 | 50.0 | 75.0 | +25.0 [")


def test_the_headlines_are_those_of_the_mean(tmp_path):
    write_scores(tmp_path, "a", RISING)
    write_scores(tmp_path, "b", ONLY_DPO)
    mean = summarize(with_benchmarks("a", "b"), tmp_path)["all"]["mean"]
    headlines = {file.stem: read_json(file) for file in (tmp_path / "metrics" / "mean").iterdir()}
    assert headlines.keys() == {*scores.MODELS, *scores.COMPARISONS}
    assert headlines["sft"] == {"score": 0.5, "n": 6}
    assert headlines["sft_vs_base"] == {"difference": 0.125, "p": mean["sft_vs_base"]["holm"]}


def test_all_of_the_summary_is_numbers(tmp_path):
    """`reprotune lineage` takes any of them by its key."""
    write_scores(tmp_path, "a", RISING, contaminated=(0,))

    def leaves(value):
        return (
            [leaf for item in value.values() for leaf in leaves(item)] if isinstance(value, dict) else [value]
        )

    summary = summarize(with_benchmarks("a"), tmp_path)
    assert {type(leaf) for leaf in leaves(summary)} <= {int, float}


def test_the_comparisons_of_the_benchmarks_are_one_family(tmp_path):
    """On 40 rows, 9 better and 1 worse give p = 22/1024, which a family of six comparisons takes above 5%."""
    base = [1, *[0] * 39]
    write_scores(tmp_path, "a", {"base": base, "sft": [0, *[1] * 9, *[0] * 30], "dpo": base})
    write_scores(tmp_path, "b", {"base": base, "sft": base, "dpo": base})
    a, b, mean = summarize(with_benchmarks("a", "b"), tmp_path)["all"].values()
    assert a["sft_vs_base"]["p"] == pytest.approx(22 / 1024)
    assert a["sft_vs_base"]["holm"] == a["dpo_vs_sft"]["holm"] == pytest.approx(6 * 22 / 1024)
    assert b["dpo_vs_base"]["holm"] == 1.0
    assert mean["sft_vs_base"]["holm"] == pytest.approx(3 * mean["sft_vs_base"]["p"])


def test_a_gain_that_is_shown_is_shared_out(tmp_path):
    """Of 30 points in the mean SFT brings 10 and DPO 20. Only one of the two benchmarks changes."""
    write_scores(tmp_path, "a", {"base": [0] * 100, "sft": [1] * 20 + [0] * 80, "dpo": [1] * 60 + [0] * 40})
    write_scores(tmp_path, "b", {model: [1, 0] * 30 for model in scores.MODELS})
    shares = summarize(with_benchmarks("a", "b"), tmp_path)["share_of_gain"]
    sft = shares["sft"]
    assert sft["share"] == pytest.approx(1 / 3) and shares["dpo"]["share"] == pytest.approx(2 / 3)
    # 20 of the 60 rows that changed did so with SFT: a binomial share
    assert sft["low"] == pytest.approx(1 / 3 - 0.12, abs=0.02)
    assert sft["high"] == pytest.approx(1 / 3 + 0.12, abs=0.02)


@pytest.mark.parametrize("dpo", [[1, 1], [0, 0], [1, 0]])
def test_a_gain_that_is_not_shown_is_not_shared_out(dpo, tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 0] * 20, "sft": [1, 0] * 20, "dpo": [*dpo, *[1, 0] * 19]})
    assert "share_of_gain" not in summarize(with_benchmarks("a"), tmp_path)


def test_clean_rows_are_counted_apart(tmp_path):
    write_scores(tmp_path, "a", RISING, contaminated=(0, 3, 99))
    write_scores(tmp_path, "b", ONLY_DPO, contaminated=(0,))
    summary = summarize(with_benchmarks("a", "b"), tmp_path)
    assert summary["all"]["a"]["n"] == 4 and summary["all"]["a"]["base"]["score"] == 0.25
    clean = summary["clean"]
    assert clean.keys() == {"a", "mean"}, "one row has no variance"
    assert clean["a"]["n"] == clean["mean"]["n"] == 2
    assert [clean["a"][model]["score"] for model in ("base", "sft", "dpo")] == [0.0, 0.0, 0.5]
    assert clean["a"]["dpo_vs_base"]["difference"] == clean["mean"]["dpo"]["score"] == 0.5


def test_the_stage_names_the_options_that_it_needs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "the following arguments are required: --metrics, --evals, --contam" in capsys.readouterr().err
