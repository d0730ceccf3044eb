"""The report says what the metrics say, calls a gain only what a test shows, and repeats to the byte; its page shows all text as text."""

import ast
import re
import shutil
from string import Formatter

import pytest
from ruamel.yaml import YAML

from stages import InputError, compare, language, params, report, samples
from stages.figures import comparisons, labels, pretty
from stages.records import read_json, write_csv, write_json, write_parquet
from stages.statistics import p_text, percents
from tests.browser import Browser
from tests.conftest import changed
from tests.test_compare import SAMPLE, write_scores
from tests.tiny import ROOT

SFT = {"steps": 5, "tokens": 1234, "devices": ["H100", "H100"], "measured": [{"measure": "loss", "rows": "held-out rows", "n": 99, "unit": "tokens", "before": 2.0, "after": 1.5}]}
DPO = {"steps": 3, "tokens": 55, "devices": ["H100", "H100"], "measured": [{"measure": "reward accuracy", "rows": "held-out pairs", "n": 4, "unit": "pairs", "before": 0.5, "after": 0.75}]}
COUNTS = {"raw": 20, "over_limit": 2, "invalid": 1, "no_preference": 0, "overlong": 3, "without_labels": 0, "contaminated": 0, "duplicate": 1, "near_duplicate": 1, "not_drawn": 0, "held_out": 2, "train": 10}
PART_OF_DATA = {"rows": COUNTS, "tokens": {"train": 1234}}
DATA = {"rows": 10, "total": [PART_OF_DATA], "sources": [{"source": "rows"} | PART_OF_DATA], "shards": [{"part": "train", "rows": 3, "tokens": 1234, "filled": 0.9}]}


@pytest.fixture
def metrics(tmp_path, settings):
    for name in settings.evaluate.benchmarks:
        write_scores(tmp_path, name, {"base": [1, 0] * 20, "sft": [1, 0] * 20, "dpo": [1] * 40 if name == "gsm8k" else [0, 1] * 20}, contaminated=(3,))
    folders = [tmp_path / name for name in ("metrics", "evals", "contamination")]
    compare.run(settings, *folders, tmp_path / "metrics" / "summary.json", tmp_path / "summary.md", tmp_path / "scores.json")
    write_json(tmp_path / "metrics" / "train" / "sft.json", SFT)
    write_json(tmp_path / "metrics" / "train" / "dpo.json", DPO)
    for name in ("sft", "dpo"):
        write_json(tmp_path / "metrics" / "data" / f"{name}.json", DATA)
    found = [{"benchmark": name, "rows": 1000, "rows_contaminated": 1, "rows_with_13_gram": 1, "rows_too_short": 7} for name in settings.evaluate.benchmarks]
    write_json(tmp_path / "metrics" / "merge.json", {"kl": 1e-4, "agreement": 0.99, "n": 1827, "scored_kl": 0.27, "scored_agreement": 0.77})
    for stage, columns, on_the_way in (("sft", ["loss"], ["loss"]), ("dpo", ["loss", "reward_margin", "logps_chosen", "logps_rejected"], ["loss", "reward_margin", "chosen_log_prob", "rejected_log_prob"])):
        for name, keys in ((stage, columns), (f"{stage}_held_out", on_the_way)):
            write_csv(tmp_path / "plots" / f"{name}.csv", [{"step": step, **{key: 1.0 / step for key in keys}} for step in (1, 2, 3)], ["step", *keys])
    trained = [{"source": "sft.rows", "rows": 20, "rows_contaminated": 1}]
    write_json(tmp_path / "metrics" / "data" / "contamination.json", {"benchmarks": found, "training": trained})
    return tmp_path / "metrics"


def run(settings, metrics, out):
    report.run(settings, metrics, metrics.parent / "evals", metrics.parent / "plots", ROOT / "templates" / "report", out)


def test_the_numbers_are_those_of_the_metrics(metrics, settings, tmp_path):
    run(settings, metrics, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    summary = read_json(metrics / "summary.json")
    for name, row in summary["all"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {pretty(name)} | {row['n']:,} |"))
        assert line.split(" | ")[3:] == [percents(row[model]) + " |" * (model == "dpo") for model in compare.MODELS]
        assert all(f"{round(100 * row[model][key], 6):.1f}" in line for model in compare.MODELS for key in ("score", "low", "high"))
        for label, value in ((label, row[label]) for label in compare.COMPARISONS):
            difference, low, high = (round(100 * value[key], 6) for key in ("difference", "low", "high"))
            shown = f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]" if value["better"] or value["worse"] else f"{difference:+.1f} ("
            assert shown in text
            tested = f"| {pretty(name)} | {comparisons()[label]} | {value['better']} | {value['worse']} | {p_text(value['p'])} | {p_text(value['holm'])} | {100 * value['detectable']:.1f} |"
            assert tested in text
    assert "SFT trained 5 steps on 1,234 tokens; DPO trained 3 steps on 55 tokens; 200 rows were scored by each of 3 models." in text
    assert "Hardware: SFT: 2 × H100; DPO: 2 × H100. Versions: Python 3." in text
    assert "| SFT loss, held-out rows | 2.0000 | 1.5000 | 99 tokens |" in text
    assert "| DPO reward accuracy, held-out pairs | 0.5000 | 0.7500 | 4 pairs |" in text
    assert "| SFT: rows | 20 | 2 | 1 | 0 | 3 | 0 | 0 | 1 | 1 | 0 | 2 | 10 | 1,234 |" in text
    assert "| GSM8K | 1,000 | 1 | 7 | 39 |" in text and "sft.rows 1 of 20" in text


def test_only_supported_differences_are_called_gains(metrics, settings, tmp_path):
    run(settings, metrics, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ") and ("shown)" in line or "gain)" in line)}
    assert rows["GSM8K"].endswith("(gain) |") and rows["GSM8K"].count("gain") == 2
    assert rows["WinoGrande"].count("no difference shown") == 3
    assert "Benchmarks with a gain: GSM8K." in text and "Benchmarks with a drop" not in text
    assert "No drop of a score is shown. Rows that the base model has right and SFT + DPO wrong: ARC-Challenge 20, CommonsenseQA 20, HellaSwag 20, WinoGrande 20." in text


def test_a_drop_is_said_to_be_one(metrics, settings, tmp_path):
    for name in settings.evaluate.benchmarks:
        write_scores(tmp_path, name, {"base": [1] * 40, "sft": [1] * 40, "dpo": [1] * 20 + [0] * 20}, contaminated=(3,))
    folders = [tmp_path / name for name in ("metrics", "evals", "contamination")]
    compare.run(settings, *folders, tmp_path / "metrics" / "summary.json", tmp_path / "summary.md", tmp_path / "scores.json")
    run(settings, metrics, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "That is a drop from the base model of -50.0 [" in text and "Drops that the test shows: ARC-Challenge (DPO − SFT): -50.0 [" in text and "(gain)" not in text


def test_scores_stand_beside_reported_ones(metrics, settings, tmp_path):
    """GSM8K's base has 20 of 40: Wilson's interval is 35.2 to 64.8."""
    reported = {"source": "a paper", "scores": {"gsm8k": {"base": 64.7, "sft": 64.9, "dpo": 100.0}}}
    run(changed(settings, {"report.reported": reported}), metrics, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Reported by: a paper." in text
    for line in ("| GSM8K | base | 50.0 [35.2, 64.8] | 64.70 | -14.7 | yes |", "| GSM8K | SFT | 50.0 [35.2, 64.8] | 64.90 | -14.9 | no |", "| GSM8K | SFT + DPO | 100.0 [91.2, 100.0] | 100.00 | +0.0 | yes |"):
        assert line in text, line


def test_the_card_says_what_the_model_is_made_of(metrics, settings, tmp_path):
    run(changed(settings, {"model.quantization": "nf4"}), metrics, tmp_path / "report")
    text = (tmp_path / "report" / "model_card.md").read_text()
    header, body = text.removeprefix("---\n").split("---\n", 1)
    assert YAML(typ="safe").load(header) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sft", "dpo", "trl"]}
    for part in ("| SFT: rows | local `tiny/alpaca.json` | CC0-1.0 |", "| preferences: pairs | local `tiny/preferences.json` | not stated |", "| base model | local `tiny/model` | Apache-2.0 |", "on 1,827 held-out tokens: KL divergence 0.0001 nats", "KL divergence 0.27 nats a token, the same likeliest token at 77.0%", "| seed | 42 |", "(gain)".strip("()")):
        assert part in body, part
    recipe = params.load(ROOT / "recipes" / "qwen3-4b.yaml")
    from stages.sections import card_header

    assert card_header(recipe)["base_model"] == ["Qwen/Qwen3-4B-Base"] and card_header(recipe)["datasets"] == ["tatsu-lab/alpaca", "HuggingFaceH4/ultrafeedback_binarized"]


def said() -> set[str]:
    """Every text that the code says, and those that it takes from the metrics."""
    found = {"loss", "reward margin", "reward accuracy", "chosen log-prob", "rejected log-prob", "training pairs", "held-out pairs", "held-out rows", "pairs", "tokens", "SFT", "DPO"}
    for file in (ROOT / "stages").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say" and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def test_every_text_is_translated():
    translations = YAML(typ="safe").load(ROOT / "templates" / "report" / "zh.yaml")
    assert translations.keys() == said()
    for text, translation in translations.items():
        assert {part[1:3] for part in Formatter().parse(text) if part[1]} == {part[1:3] for part in Formatter().parse(translation) if part[1]}, text


def test_a_report_in_chinese(metrics, settings, tmp_path):
    """The same numbers in the same places; every letter of the figures has a shape."""
    run(settings, metrics, tmp_path / "en")
    run(changed(settings, {"report.language": "zh"}), metrics, tmp_path / "zh")
    english, chinese = ((tmp_path / name / "report.md").read_text() for name in ("en", "zh"))
    assert "## 结果" in chinese and "未显示出差异" in chinese and "no difference" not in chinese and '<html lang="zh">' in (tmp_path / "zh" / "report.html").read_text()
    tables = [[re.findall(r"-?[\d.]+", line) for line in text.splitlines() if line.startswith("| ") and "[" in line] for text in (english, chinese)]
    assert tables[0] == tables[1] and len(tables[0]) > 10
    assert "NotoSansSC" in (tmp_path / "zh" / "comparison_bar.svg").read_text() and "NotoSansSC" not in (tmp_path / "en" / "comparison_bar.svg").read_text()


def test_a_text_without_a_translation_is_named():
    language.use("zh", ROOT / "templates" / "report")
    with pytest.raises(InputError, match="found no translation of 'never said'"):
        language.say("never said")
    language.use("en", ROOT / "templates" / "report")


def test_the_committed_report_is_the_one_the_code_makes(tmp_path, monkeypatch):
    """From the committed numbers, but for what comes from the samples, which are not in git."""
    settings = params.load(ROOT / "params.yaml")
    committed = ROOT / "report"
    chances = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[2] for line in (committed / "report.md").read_text().splitlines() if line.count(" | ") == 5 and "[" in line}
    samples = {name: {model: {} for model in labels()} for name in settings.evaluate.benchmarks}
    monkeypatch.setattr("stages.samples.read", lambda names, evals: samples)
    monkeypatch.setattr("stages.samples.chance", lambda found: {name: float(chances[pretty(name)]) / 100 for name in found if chances[pretty(name)]})
    monkeypatch.setattr("stages.samples.page", lambda found: {})
    report.run(settings, ROOT / "metrics", tmp_path, ROOT / "plots", ROOT / "templates" / "report", tmp_path / "report")
    made = {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()}
    assert made.keys() == {file.name for file in committed.iterdir()}
    for name in made.keys() - {"report.html"}:
        assert made[name] == (committed / name).read_bytes(), name
    parts = [text.split('<script type="application/json" id="samples">')[0] for text in (made["report.html"].decode(), (committed / "report.html").read_text())]
    assert parts[0] == parts[1]


def test_six_figures_and_the_same_bytes_twice(metrics, settings, tmp_path):
    for name in ("one", "two"):
        run(settings, metrics, tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    figures = ["average_performance.svg", "comparison_bar.svg", "improvement_chart.svg", "radar_chart.svg", "training_curves.svg", "training_pipeline.svg"]
    assert files == sorted([*figures, "model_card.md", "report.html", "report.md"])
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        if file.endswith(".svg"):
            assert f"({file})" in (tmp_path / "one" / "report.md").read_text()


def test_a_broken_metrics_file_is_named(metrics, settings, tmp_path):
    (metrics / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json: not a JSON file"):
        run(settings, metrics, tmp_path / "report")


def test_a_broken_curve_is_named(metrics, settings, tmp_path):
    (tmp_path / "plots" / "dpo.csv").write_text("step,loss\n1,nonsense\n")
    with pytest.raises(InputError, match=r"dpo\.csv: not a table of numbers .*; `dvc repro` makes it anew"):
        run(settings, metrics, tmp_path / "report")


@pytest.mark.parametrize(("after", "warned"), [(-61.0, True), (-59.0, False), (-40.0, False)])
def test_a_collapse_of_the_chosen_answers_is_a_warning(after, warned, metrics, settings, tmp_path):
    row = {"measure": "chosen log-prob", "rows": "held-out pairs", "n": 4, "unit": "pairs", "before": -50.0, "after": after}
    other = row | {"measure": "rejected log-prob", "before": -60.0, "after": -90.0}
    write_json(metrics / "train" / "dpo.json", DPO | {"measured": [*DPO["measured"], row, other]})
    run(settings, metrics, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert ("fell from -50.0 to -61.0 nats. That of the rejected ones fell from -60.0 to -90.0: both are unlearned." in text) is warned and ("**Warning**" in text) is warned


@pytest.mark.parametrize(
    ("gold", "choices", "expected"),
    [("1", [" a", " b"], "b"), ("B", [" A", " B"], "B"), ("2", [" 1", " 2"], "2"), ("was bigger.", ["it was bigger.", "he was bigger."], "was bigger."), ("42", None, "42")],
)
def test_the_expected_answer_is_shown_as_the_choices_have_it(gold, choices, expected):
    assert samples.expected({"gold": gold, "choices": choices}) == expected


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> \u202egnp.exe\u202c & <b>bold</b>"


@pytest.fixture
def page(metrics, settings, tmp_path):
    """The report with samples that try to be more than text."""
    rows = [
        SAMPLE | {"doc_id": 0, "correct": 1.0, "predicted": "0", "prompt": HOSTILE, "choices": None, "log_probs": None, "generation": HOSTILE},
        SAMPLE | {"doc_id": 3, "correct": 0.0, "predicted": "1", "prompt": "x" * 100_000 + "the end", "choices": None, "log_probs": None, "generation": "y" * 100_000},
    ]
    for model in ("base", "sft", "dpo"):
        own = [row | {"correct": 1.0} if model == "dpo" else row for row in rows]
        write_parquet(tmp_path / "evals" / model / "gsm8k.parquet", own)
    settings = changed(settings, {"report.title": f"Title {HOSTILE}", "report.note": HOSTILE})
    run(settings, metrics, tmp_path / "report")
    return tmp_path / "report" / "report.html"


def test_the_page_needs_nothing_and_allows_nothing(page):
    text = page.read_text()
    assert len(text) < 1_000_000, "long texts are cut"
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text.replace(HOSTILE, "")) and "://" not in re.sub(r"data:[^\"]*", "", text)
    assert text.count("<script") == 2 and "default-src &#39;none&#39;;" in text and "unsafe" not in text


def test_the_page_works_in_a_browser(page):
    """Hostile text is shown as text, samples are filtered and passed on by address, tables sort, and the keyboard does."""
    if not shutil.which("chromium"):
        pytest.skip("no chromium")
    with Browser(f"file://{page}#benchmark=gsm8k&change=all") as browser:
        assert browser.run("document.title") == f"Title {HOSTILE}" and browser.run("document.querySelectorAll('script').length") == 2
        assert browser.run("document.querySelectorAll('main img').length") == 6 and browser.run("[...document.images].every((one) => one.naturalWidth > 100)")
        assert browser.run("document.querySelector('#sample .text').textContent") == HOSTILE
        assert browser.run("[...document.querySelectorAll('#sample .models section')].map((one) => one.className).join()") == "right,right,right"
        assert browser.run("document.getElementById('count').textContent") == "1 / 2 here, of 2"
        assert browser.run("document.querySelector('button[name=previous]').getAttribute('aria-disabled')") == "true"
        browser.press("ArrowRight", 39)
        assert browser.run("document.getElementById('count').textContent").startswith("2 / 2 here") and "place=1" in browser.run("location.hash")
        shown = browser.run("document.querySelector('#sample .text').textContent")
        assert shown.startswith("[… 96,007 characters]") and shown.endswith("the end") and len(shown) < 5000
        browser.run("location.hash = 'benchmark=gsm8k&change=dpo_vs_sft_better'; 0")
        browser.wait("document.getElementById('count').textContent.startsWith('1 / 1 here')")
        assert browser.run("document.querySelector('#sample h3').textContent") == "Row 3"
        browser.press("k", 75)
        assert browser.run("document.querySelector('#sample h3').textContent") == "Row 3", "there is nothing before the first"
        # what is looked for is what was written, not how the page keeps it
        browser.run("location.hash = 'benchmark=gsm8k&change=all&text=onerror'; 0")
        browser.wait("document.getElementById('count').textContent.startsWith('1 / 1 here, of 2')")
        browser.run("location.hash = 'benchmark=gsm8k&change=all&text=correct'; 0")
        browser.wait("document.getElementById('count').textContent.startsWith('No such row')")
        browser.run("location.hash = 'benchmark=arc_challenge&change=all'; 0")
        browser.wait("document.querySelectorAll('#sample bdi').length === 6")
        assert browser.run("document.querySelector('#sample .chosen').textContent") == " sleeps (-1.00)"
        browser.run("location.hash = 'benchmark=arc_challenge&change=dpo_vs_base_worse&text=nonsense'; 0")
        browser.wait("document.getElementById('count').textContent.startsWith('No such row')")
        browser.run("document.querySelector('th button').focus(); 0")
        before = browser.run("[...document.querySelector('table').tBodies[0].rows].map((row) => row.cells[0].textContent)")
        for order in (sorted(before), sorted(before, reverse=True)):
            browser.press("Enter", 13, "\r")
            assert browser.run("[...document.querySelector('table').tBodies[0].rows].map((row) => row.cells[0].textContent)") == order
        browser.run("document.querySelectorAll('table')[0].querySelectorAll('th button')[3].click(); 0")
        scores = browser.run("[...document.querySelector('table').tBodies[0].rows].map((row) => parseFloat(row.cells[3].textContent))")
        assert scores == sorted(scores)
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
        assert browser.run("document.documentElement.scrollWidth") <= 360
        assert not browser.errors
