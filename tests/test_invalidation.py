"""Each row of docs/invalidation.md, held against DVC itself on a finished run."""

import random
import re
import shutil

import pytest
from dvc.repo import Repo

from stages import invalidation, params, provenance
from tests.clones import DVC, call, own_copy, with_params
from tests.tiny import ROOT

ROWS = re.findall(r"^\| (`.*`) \| ([^(|]+?)(?: \((.*)\))? \|$", (ROOT / "docs" / "invalidation.md").read_text(), re.MULTILINE)
VALUES = {"model.chat_template": "alpaca", "evaluate.benchmarks": ["arc_challenge", "hellaswag"]}
"""Where another value than one of the same kind is needed."""
BENCHMARKS = ["arc_challenge", "gsm8k"]


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory):
    return own_copy(finished, tmp_path_factory.mktemp("invalidation") / "clone")


def test_the_table_is_what_dvc_yaml_gives(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["invalidation"])
    invalidation.main()
    assert capsys.readouterr().out == (ROOT / "docs" / "invalidation.md").read_text()
    rows = [change for changes, *_ in ROWS for change in changes.split(", ")]
    assert len(rows) == len(set(rows)) > 100


def named(text: str) -> set[str]:
    """The stages of a text of the table, with the tiny run's benchmarks and gsm8k for <b>."""
    found = set()
    for name in filter(None, text.split(", ")):
        stage, _, cell = name.replace("<b>", "gsm8k").partition("@")
        if stage == "fetch_benchmark":
            found |= {f"{stage}@{cell}"} if cell else {f"{stage}@{one}" for one in BENCHMARKS}
        elif stage == "evaluate":
            model, _, benchmark = (cell or "*-*").partition("-")
            found |= {f"{stage}@{a}-{b}" for a in (("base", "sft", "dpo") if model == "*" else (model,)) for b in (BENCHMARKS if benchmark == "*" else (benchmark,))}
        else:
            found.add(stage)
    return found


def stale(folder) -> set[str]:
    """What `dvc status` finds changed, but for the check of params.yaml as a whole."""
    with Repo(str(folder)) as repo:
        return set(repo.status()) - {invalidation.CHECK}


@pytest.mark.parametrize(("changes", "reading", "behind"), ROWS, ids=[changes.split("`")[1] for changes, *_ in ROWS])
def test_dvc_finds_the_stages_of_a_row_stale(changes, reading, behind, clone, monkeypatch):
    """Those that read it, for one of the row's changes; and all of them once the first ones have made something else."""
    monkeypatch.chdir(clone)
    rng = random.Random(changes)
    change = rng.choice(re.findall(r"`([^`]+)`", changes)).replace("<b>", "gsm8k").replace("alpaca_demo", "rows").replace("dpo_demo", "pairs")
    if "/" in change:
        files = [clone / change] if (clone / change).is_file() else sorted((clone / change).iterdir())
        with files[0].open("a") as file:
            file.write("\n")
    elif change.startswith("libraries.yaml:"):
        name = change.split(":")[1]
        file = clone / "libraries.yaml"
        file.write_text(re.sub(rf"(?m)^{name}: .*$", f"{name}: 9.9.9", file.read_text()))
    else:
        value = provenance.value_of(params.load().model_dump(), change)
        with_params(clone, **{change.replace(".", "__"): VALUES.get(change) or {"another": 1} if isinstance(value, dict) and change not in VALUES else VALUES.get(change, "another")})
    try:
        found = stale(clone)
    finally:
        call("git", "checkout", "-q", "--", "stages", "templates", "configs", "params.yaml", "libraries.yaml", cwd=clone)
    expected = named(reading) - {invalidation.CHECK}
    if change == "evaluate.benchmarks":
        # cells of a benchmark that has none yet, and the others as they were
        expected |= {"fetch_benchmark@hellaswag", *(f"evaluate@{model}-hellaswag" for model in ("base", "sft", "dpo"))}
    assert found == expected
    if expected and change != "evaluate.benchmarks":
        with Repo(str(clone)) as repo:
            downstream = repo.reproduce(targets=sorted(expected), downstream=True, dry=True, force=True)
        assert {stage.addressing for stage in downstream} == expected | named(behind)


def test_a_comment_the_order_of_keys_and_more_devices_change_nothing(clone, monkeypatch):
    file = clone / "params.yaml"
    text = file.read_text()
    sections = re.split(r"(?m)^(?=\w)", text)
    assert len(sections) > 10
    try:
        file.write_text("# a comment\n" + "".join(reversed(sections)).replace("5e-05", "0.00005").replace("5e-5", "0.00005"))
        monkeypatch.setenv("REPROTUNE_PROCESSES", "4")
        monkeypatch.setenv("REPROTUNE_CHECKPOINT_SECONDS", "1")
        with Repo(str(clone)) as repo:
            assert repo.status() == {}
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dpo__beta": 0.3}, {"dpo", "evaluate@dpo-arc_challenge", "evaluate@dpo-gsm8k", "compare", "merge", "report"}),
        ({"benchmarks__gsm8k__limit": 5}, {"evaluate@base-gsm8k", "evaluate@sft-gsm8k", "evaluate@dpo-gsm8k", "compare", "report"}),
        ({"report__language": "zh"}, {"report"}),
        ({"tokenize__dpo__max_dropped": 0.5}, {"tokenize_dpo"}),
    ],
)
def test_dvc_runs_those_stages_and_no_others(change, expected, finished, tmp_path):
    """Really; a budget that changes no row stops the chain behind it."""
    folder = own_copy(finished, tmp_path / "clone")
    shutil.rmtree(folder / ".dvc" / "cache" / "runs")
    with_params(folder, **change)
    ran = set(re.findall(r"^Running stage '(\S+)':", call(*DVC, "repro", cwd=folder).stdout, re.MULTILINE))
    assert ran == expected | {"check_params"}


def test_one_change_is_answered(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["invalidation", "dpo.beta", "./stages/compare.py"])
    invalidation.main()
    assert capsys.readouterr().out.splitlines() == [
        "dpo.beta: dpo, report; behind, if what those make is another: evaluate@dpo-*, compare, merge",
        "stages/compare.py: compare; behind, if what those make is another: report",
    ]
    monkeypatch.setattr("sys.argv", ["invalidation", "dpo.betta"])
    with pytest.raises(Exception, match=r"found 'dpo\.betta', expected a key of params\.yaml"):
        invalidation.main()
