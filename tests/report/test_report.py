"""The report says what the metrics say, calls a gain only what a test shows, and repeats to the byte."""

import pytest

from reprotune import fingerprints, params_file
from reprotune.comparison.scores import COMPARISONS, MODELS
from reprotune.comparison.wording import p_text, score_text
from reprotune.data.contamination import LONG
from reprotune.data.ngrams import SHORT
from reprotune.errors import InputError
from reprotune.records import read_json, write_metrics
from reprotune.report import report
from reprotune.report.names import benchmark_name, comparison_names
from tests.comparison.cells import summarize, write_scores
from tests.conftest import changed
from tests.report.written import CONTAMINATED, DPO, TEMPLATES, make_report, unquantized, write_run
from tests.tiny import ROOT

FIGURES = [
    "average_performance.svg",
    "comparison_bar.svg",
    "improvement_chart.svg",
    "radar_chart.svg",
    "training_curves.svg",
    "training_pipeline.svg",
]


def written(settings, metrics) -> str:
    """The report as Markdown."""
    make_report(settings, metrics, metrics.parent / "report")
    return (metrics.parent / "report" / "report.md").read_text()


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """The metrics folder of a run and its report as Markdown, for tests that change neither."""
    settings = unquantized(world)
    metrics = write_run(settings, tmp_path_factory.mktemp("plain"))
    return metrics, written(settings, metrics)


@pytest.fixture
def summary(plain):
    return read_json(plain[0] / "summary.json")


@pytest.fixture
def text(plain):
    return plain[1]


def test_the_scores_are_those_of_the_summary(summary, text):
    for name, row in summary["all"].items():
        start = f"| {benchmark_name(name)} | {row['n']:,} |"
        line = next(line for line in text.splitlines() if line.startswith(start))
        assert line.endswith(f" | {' | '.join(score_text(row[model]) for model in MODELS)} |")
        numbers = [row[model][key] for model in MODELS for key in ("score", "low", "high")]
        assert all(f"{round(100 * number, 6):.1f}" in line for number in numbers)


def test_the_differences_and_tests_are_those_of_the_summary(summary, text):
    for name, row in summary["all"].items():
        for label in COMPARISONS:
            value = row[label]
            difference, low, high = (round(100 * value[key], 6) for key in ("difference", "low", "high"))
            interval = f" [{low:+.1f}, {high:+.1f}]" if value["better"] or value["worse"] else ""
            assert f"| {difference:+.1f}{interval} (" in text
            cells = [
                benchmark_name(name),
                comparison_names()[label],
                str(value["better"]),
                str(value["worse"]),
                p_text(value["p"]),
                p_text(value["holm"]),
                f"{100 * value['detectable']:.1f}",
            ]
            assert f"| {' | '.join(cells)} |" in text


def test_the_other_numbers_are_those_of_the_metrics(text):
    assert (
        "SFT trained 5 steps on 1,234 tokens; DPO trained 3 steps on 55 tokens; "
        "200 rows were scored by each of 3 models." in text
    )
    assert "| SFT loss, held-out rows | 2.0000 | 1.5000 | 99 tokens |" in text
    assert "| DPO reward accuracy, held-out pairs | 0.5000 | 0.7500 | 4 pairs |" in text
    assert "| SFT: rows | 20 | 2 | 1 | 0 | 3 | 0 | 0 | 1 | 1 | 0 | 2 | 10 | 1,234 |" in text
    assert "| GSM8K | 1,000 | 1 | 7 | 39 |" in text and "sft.rows 1 of 20" in text


def test_the_versions_are_those_of_the_lock_file(text):
    """Devices differ from run to run, so the report does not name them."""
    pinned = fingerprints.locked_versions(ROOT / "requirements.lock")
    assert f"Versions: torch {pinned['torch']}, transformers {pinned['transformers']}, " in text
    assert "Hardware" not in text


def test_the_contamination_rule_is_the_one_applied(text):
    share = f"or at least the set share of their {SHORT}-grams"
    assert f"share {LONG} words in a row with a raw training row, {share}" in text
    assert f"rows of fewer than {SHORT} words" in text


def test_only_supported_differences_are_called_gains(text):
    rows = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in text.splitlines()
        if line.startswith("| ") and ("shown)" in line or "gain)" in line)
    }
    assert rows["GSM8K"].endswith("(gain) |") and rows["GSM8K"].count("gain") == 2
    assert rows["WinoGrande"].count("no difference shown") == 3
    assert "Benchmarks with a gain: GSM8K." in text and "Benchmarks with a drop" not in text
    assert (
        "No drop of a score is shown. Rows that the base model has right and SFT + DPO wrong: "
        "ARC-Challenge 20, CommonsenseQA 20, HellaSwag 20, WinoGrande 20." in text
    )


def test_a_drop_is_said_to_be_one(metrics, settings, tmp_path):
    for name in settings.evaluate.benchmarks:
        correct = {"base": [1] * 40, "sft": [1] * 40, "dpo": [1] * 20 + [0] * 20}
        write_scores(tmp_path, name, correct, CONTAMINATED)
    summarize(settings, tmp_path)
    text = written(settings, metrics)
    assert "That is a drop from the base model of -50.0 [" in text
    assert "Drops that the test shows: ARC-Challenge (DPO − SFT): -50.0 [" in text
    assert "(gain)" not in text


def test_scores_stand_beside_reported_ones(metrics, settings):
    """GSM8K's base has 20 of 40: Wilson's interval is 35.2 to 64.8."""
    reported = {"source": "a paper", "scores": {"gsm8k": {"base": 64.7, "sft": 64.9, "dpo": 100.0}}}
    text = written(changed(settings, {"report.reported": reported}), metrics)
    assert "Reported by: a paper." in text
    for line in (
        "| GSM8K | base | 50.0 [35.2, 64.8] | 64.70 | -14.7 | yes |",
        "| GSM8K | SFT | 50.0 [35.2, 64.8] | 64.90 | -14.9 | no |",
        "| GSM8K | SFT + DPO | 100.0 [91.2, 100.0] | 100.00 | +0.0 | yes |",
    ):
        assert line in text, line


@pytest.mark.parametrize(("after", "warned"), [(-61.0, True), (-59.0, False), (-40.0, False)])
def test_a_collapse_of_the_chosen_answers_is_a_warning(after, warned, metrics, settings):
    pairs = {"rows": "held-out pairs", "n": 4, "unit": "pairs"}
    chosen = pairs | {"measure": "chosen log-prob", "before": -50.0, "after": after}
    rejected = pairs | {"measure": "rejected log-prob", "before": -60.0, "after": -90.0}
    measured = [*DPO["measured"], chosen, rejected]
    write_metrics(metrics / "train" / "dpo.json", {}, DPO | {"measured": measured})
    text = written(settings, metrics)
    assert ("**Warning**" in text) is warned
    assert (
        "fell from -50.0 to -61.0 nats. "
        "That of the rejected ones fell from -60.0 to -90.0: both are unlearned." in text
    ) is warned


def test_the_committed_report_is_the_one_the_code_makes(tmp_path, monkeypatch):
    """From the committed numbers. Samples are not in git, so what comes from them is left out."""
    settings = params_file.load(ROOT / "params.yaml")
    committed = ROOT / "report"
    chances = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[2]
        for line in (committed / "report.md").read_text().splitlines()
        if line.count(" | ") == 5 and "[" in line
    }
    chance = {
        name: float(chances[benchmark_name(name)]) / 100
        for name in settings.evaluate.benchmarks
        if chances[benchmark_name(name)]
    }
    monkeypatch.setattr("reprotune.report.samples.read", lambda names, evals: {})
    monkeypatch.setattr("reprotune.report.samples.chance", lambda cells: chance)
    monkeypatch.setattr("reprotune.report.samples.page", lambda cells: {})
    out = tmp_path / "report"
    lock = ROOT / "requirements.lock"
    report.run(settings, ROOT / "metrics", tmp_path, ROOT / "plots", TEMPLATES, lock, out)
    made = {file.name: file.read_bytes() for file in out.iterdir()}
    assert made.keys() == {file.name for file in committed.iterdir()}
    for name in made.keys() - {"report.html"}:
        assert made[name] == (committed / name).read_bytes(), name
    pages = [made["report.html"].decode(), (committed / "report.html").read_text()]
    own, theirs = (page.split('<script type="application/json" id="samples">')[0] for page in pages)
    assert own == theirs


def test_six_figures_and_the_same_bytes_twice(metrics, settings, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        make_report(settings, metrics, folder)
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted([*FIGURES, "model_card.md", "report.html", "report.md"])
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()
        if file.endswith(".svg"):
            assert f"({file})" in (first / "report.md").read_text()


def test_a_broken_metrics_file_is_named(metrics, settings):
    (metrics / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: not a JSON file"):
        written(settings, metrics)


def test_a_broken_curve_is_named(metrics, settings, tmp_path):
    (tmp_path / "plots" / "dpo.csv").write_text("step,loss\n1,nonsense\n")
    with pytest.raises(InputError, match=r"dpo\.csv: not a table of numbers .*; `dvc repro` makes it again"):
        written(settings, metrics)
