"""The report says what the metrics say, calls a gain only what its interval supports, and repeats to the byte."""

import pytest

from stages import compare, report
from stages.records import read_json, write_json
from tests.test_compare import write_scores

SFT = {"steps": 5, "tokens": 1234, "measured": [{"measure": "loss", "rows": "held-out rows", "n": 99, "unit": "tokens", "before": 2.0, "after": 1.5}]}
DPO = {"steps": 3, "tokens": 55, "measured": [{"measure": "reward accuracy", "rows": "held-out pairs", "n": 4, "unit": "pairs", "before": 0.5, "after": 0.75}]}
COUNTS = {"raw": 20, "over_limit": 2, "invalid": 1, "no_preference": 0, "overlong": 3, "without_labels": 0, "contaminated": 0, "duplicate": 1, "near_duplicate": 1, "not_drawn": 0, "held_out": 2, "train": 10}
PART_OF_DATA = {"rows": COUNTS, "tokens": {"train": 1234}}
DATA = {"rows": 10, "total": [PART_OF_DATA], "sources": [{"source": "rows"} | PART_OF_DATA], "shards": [{"part": "train", "rows": 3, "tokens": 1234, "filled": 0.9}]}


@pytest.fixture
def metrics(tmp_path, settings):
    for name in settings.evaluate.benchmarks:
        write_scores(tmp_path, name, {"base": [1, 0] * 20, "sft": [1, 0] * 20, "dpo": [1] * 40 if name == "gsm8k" else [0, 1] * 20}, contaminated=(3,))
    folders = [tmp_path / name for name in ("metrics", "evals", "contamination")]
    compare.run(settings.evaluate.benchmarks, *folders, tmp_path / "metrics" / "summary.json", tmp_path / "scores.json")
    write_json(tmp_path / "metrics" / "train" / "sft.json", SFT)
    write_json(tmp_path / "metrics" / "train" / "dpo.json", DPO)
    for name in ("sft", "dpo"):
        write_json(tmp_path / "metrics" / "data" / f"{name}.json", DATA)
    found = [{"benchmark": name, "rows": 1000, "rows_contaminated": 1, "rows_with_13_gram": 1, "rows_too_short": 7} for name in settings.evaluate.benchmarks]
    trained = [{"source": "sft.rows", "rows": 20, "rows_contaminated": 1}]
    write_json(tmp_path / "metrics" / "data" / "contamination.json", {"benchmarks": found, "training": trained})
    return tmp_path / "metrics"


def test_the_numbers_are_those_of_the_metrics(metrics, settings, tmp_path):
    report.run(settings, metrics, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    summary = read_json(metrics / "summary.json")
    for row in summary["all"]:
        for value in row["scores"].values():
            assert f"{round(100 * value['score'], 6):.1f} ± {round(196 * value['stderr'], 6):.1f}" in text, row["benchmark"]
    assert "SFT ran 5 steps over 1,234 tokens, DPO ran 3 steps over 55 tokens." in text
    assert "| SFT loss, held-out rows | 2.0000 | 1.5000 | 99 tokens |" in text
    assert "| DPO reward accuracy, held-out pairs | 0.5000 | 0.7500 | 4 pairs |" in text
    assert "| SFT: rows | 20 | 2 | 1 | 0 | 3 | 0 | 0 | 1 | 1 | 0 | 2 | 10 | 1,234 |" in text
    assert "| GSM8K | 1,000 | 1 | 7 | 39 |" in text and "sft.rows 1 of 20" in text


def test_only_supported_differences_are_called_gains(metrics, settings, tmp_path):
    report.run(settings, metrics, tmp_path / "report")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in (tmp_path / "report" / "report.md").read_text().splitlines() if "points" not in line and ("shown" in line or "gain)" in line)}
    assert rows["GSM8K"].endswith("(gain) |") and rows["GSM8K"].count("gain") == 2
    assert rows["WinoGrande"].count("no difference shown") == 3


def test_five_figures_and_the_same_bytes_twice(metrics, settings, tmp_path):
    for name in ("one", "two"):
        report.run(settings, metrics, tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == ["average_performance.png", "comparison_bar.png", "improvement_chart.png", "radar_chart.png", "report.md", "training_pipeline.png"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        if file.endswith(".png"):
            assert f"({file})" in (tmp_path / "one" / "report.md").read_text()


def test_a_broken_metrics_file_is_named(metrics, settings, tmp_path):
    (metrics / "summary.json").write_text("{")
    from stages import InputError

    with pytest.raises(InputError, match=r"summary\.json: not a JSON file"):
        report.run(settings, metrics, tmp_path / "report")


@pytest.mark.parametrize(("after", "warned"), [(-61.0, True), (-59.0, False), (-40.0, False)])
def test_a_collapse_of_the_chosen_answers_is_a_warning(after, warned, metrics, settings, tmp_path):
    row = {"measure": "chosen log-prob", "rows": "held-out pairs", "n": 4, "unit": "pairs", "before": -50.0, "after": after}
    write_json(metrics / "train" / "dpo.json", DPO | {"measured": [*DPO["measured"], row]})
    report.run(settings, metrics, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert ("fell from -50.0 to -61.0 nats" in text) is warned and ("**Warning**" in text) is warned
