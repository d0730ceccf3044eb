"""Each row of docs/reference/invalidation.md is compared with what DVC finds stale on a finished run."""

import random
import re
import shutil
import sys

import pytest
from dvc.repo import Repo

from reprotune import dvc_yaml, fingerprints, params_file
from reprotune.errors import InputError
from reprotune.pipeline import plan, reads
from stages import code
from tests.clones import DVC, call, own_copy, with_params
from tests.tiny import ROOT

PAGE = ROOT / "docs" / "reference" / "invalidation.md"
ROWS = re.findall(r"^\| (`.*`) \| ([^(|]+?)(?: \((.*)\))? \|$", PAGE.read_text(), re.MULTILINE)
VALUES = {
    "model.chat_template": "alpaca",
    "evaluate.benchmarks": ["arc_challenge", "hellaswag"],
    "report.licences.preferences.pairs": "another",
}
"""New values for keys that do not take an arbitrary one, or that the tiny params lack."""
QUICK = {
    "data.sft.sources.alpaca_demo.source", "dpo.beta", "benchmarks.<b>.limit", "evaluate.benchmarks",
    "templates/chatml.jinja", "trl", "reprotune/training/dpo.py", "reprotune/data/tables.py",
    "stages/report.py",
}  # fmt: skip
"""Rows with one of these are tried by the quick tests."""
SOURCES = {"fetch_sft_data": "rows", "fetch_preference_data": "pairs"}
BENCHMARKS = ["arc_challenge", "gsm8k"]


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory):
    return own_copy(finished, tmp_path_factory.mktemp("invalidation") / "clone")


def test_the_reference_names_every_param_file_and_library_once():
    changes = [change for changes, *_ in ROWS for change in changes.split(", ")]
    assert len(changes) == len(set(changes)) > 100
    assert {f"`{library}`" for library in fingerprints.LIBRARIES} <= set(changes)
    assert {"`dpo.beta`", "`templates/chatml.jinja`", "`reprotune/training/dpo.py`"} <= set(changes)


def named(text: str) -> set[str]:
    """The stages named in a cell of the table, with the benchmarks of the tiny run, and gsm8k for <b>."""
    stages = set()
    for name in filter(None, text.split(", ")):
        stage, _, cell = name.replace("<b>", "gsm8k").partition("@")
        if stage == "fetch_benchmark":
            stages |= {f"{stage}@{benchmark}" for benchmark in ([cell] if cell else BENCHMARKS)}
        elif stage in SOURCES:
            stages.add(f"{stage}@{SOURCES[stage]}")
        elif stage == "evaluate":
            model, _, benchmark = (cell or "*-*").partition("-")
            models = ["base", "sft", "dpo"] if model == "*" else [model]
            benchmarks = BENCHMARKS if benchmark == "*" else [benchmark]
            stages |= {f"{stage}@{model}-{benchmark}" for model in models for benchmark in benchmarks}
        else:
            stages.add(stage)
    return stages


def stale(folder) -> set[str]:
    """The stages in `dvc status`, without those that run after every change."""
    with Repo(str(folder)) as repo:
        return set(repo.status()) - reads.ALWAYS


def change_it(change: str, clone) -> None:
    """Change a param, a file of code, a library's version or another file."""
    if change.endswith(".py"):
        with (clone / change).open("a") as file:
            file.write("\n\ndef added() -> None:\n    print()\n")
    elif change in fingerprints.LIBRARIES:
        lock = clone / fingerprints.LOCK
        name = change.replace("_", "[-_]")
        lock.write_text(re.sub(rf"(?m)^({name})==.*$", r"\1==9.9.9", lock.read_text()))
    elif "/" in change:
        path = clone / change
        with (path if path.is_file() else min(path.iterdir())).open("a") as file:
            file.write("\n")
    else:
        changed = VALUES.get(change)
        if changed is None:
            section, _, key = change.rpartition(".")
            # the tiny params state fewer licences
            value = dvc_yaml.value_of(params_file.load().model_dump(), section or None).get(key)
            changed = {"another": 1} if isinstance(value, dict) else "another"
        with_params(clone, **{change.replace(".", "__"): changed})


def tried(changes: str, *stages: str):
    """A row as the arguments of a test, slow but for a few of each kind."""
    names = re.findall(r"`([^`]+)`", changes)
    return pytest.param(changes, *stages, id=names[0], marks=() if QUICK & set(names) else pytest.mark.slow)


@pytest.mark.parametrize(("changes", "reading", "behind"), [tried(*row) for row in ROWS])
def test_dvc_finds_the_stages_of_a_row_stale(changes, reading, behind, clone, monkeypatch):
    """`reading`: stages that read a change of the row; `behind`: stages that then get other inputs."""
    monkeypatch.chdir(clone)
    tiny_names = {"<b>": "gsm8k", "alpaca_demo": "rows", "dpo_demo": "pairs"}
    change = random.Random(changes).choice(re.findall(r"`([^`]+)`", changes))
    for name, tiny_name in tiny_names.items():
        change = change.replace(name, tiny_name)
    change_it(change, clone)
    try:
        if change.endswith(".py") or change in fingerprints.LIBRARIES:
            # what `dvc repro code` does, without its start
            monkeypatch.setattr(sys, "argv", ["code", "--out", "code.yaml"])
            code.main()
        stages = stale(clone)
    finally:
        call("git", "checkout", "-q", "--", ".", cwd=clone)
    expected = named(reading) - reads.ALWAYS - {"nothing"}
    if change == "evaluate.benchmarks":
        # the cells of the new benchmark; those of the others stay as they are
        cells = {f"evaluate@{model}-hellaswag" for model in ("base", "sft", "dpo")}
        expected |= {"fetch_benchmark@hellaswag", *cells}
    assert stages == expected
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
        file.write_text(
            "# a comment\n"
            + "".join(reversed(sections)).replace("5e-05", "0.00005").replace("5e-5", "0.00005")
        )
        monkeypatch.setenv("REPROTUNE_PROCESSES", "4")
        monkeypatch.setenv("REPROTUNE_CHECKPOINT_SECONDS", "1")
        with Repo(str(clone)) as repo:
            assert repo.status() == {}
    finally:
        file.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"dpo__beta": 0.3},
            {"dpo", "evaluate@dpo-arc_challenge", "evaluate@dpo-gsm8k", "compare", "merge", "report"},
        ),
        (
            {"benchmarks__gsm8k__limit": 5},
            {"evaluate@base-gsm8k", "evaluate@sft-gsm8k", "evaluate@dpo-gsm8k", "compare", "report"},
        ),
        ({"report__language": "zh"}, {"report"}),
        ({"tokenize__dpo__max_dropped": 0.5}, {"tokenize_dpo"}),
    ],
)
def test_dvc_runs_those_stages_and_no_others(change, expected, finished, tmp_path):
    """`dvc repro` runs for real; a changed budget that drops no row leaves every later stage fresh."""
    folder = own_copy(finished, tmp_path / "clone")
    shutil.rmtree(folder / ".dvc" / "cache" / "runs")
    with_params(folder, **change)
    ran = set(re.findall(r"^Running stage '(\S+)':", call(*DVC, "repro", cwd=folder).stdout, re.MULTILINE))
    assert ran == expected | {"check_params"}


def test_changes_are_answered(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    plan.run(["dpo.beta", "./stages/compare.py", "reprotune/report/figures.py", "trl", "reprotune/cli.py"])
    assert capsys.readouterr().out.splitlines() == [
        "dpo.beta: dpo, report; behind, if what those make differs: evaluate@dpo-*, compare, merge",
        "stages/compare.py: compare; behind, if what those make differs: report",
        "reprotune/report/figures.py: report",
        "trl: fetch_model, tokenize_sft, sft, reference, dpo, report; behind, if what those make differs: "
        "tokenize_dpo, evaluate, compare, merge",
        "reprotune/cli.py: nothing",
    ]
    for unknown in ("dpo.betta", "reprotune/nothing.py", "numpy"):
        with pytest.raises(InputError, match=rf"found '{unknown}', expected a key of params\.yaml"):
            plan.run([unknown])


def test_what_is_stale_now_is_listed(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    plan.run([])
    assert capsys.readouterr().out == "nothing is stale\n"
    change_it("reprotune/comparison/compare.py", clone)
    with_params(clone, report__title="another")
    plan.run([])
    assert capsys.readouterr().out.splitlines() == [
        "code: stale",
        "check_params: stale",
        "compare: stale, its code changed",
        "report: stale",
    ]
    call("git", "checkout", "-q", "--", ".", cwd=clone)
