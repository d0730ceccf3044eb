"""Comparison with another revision, in a git repository with scores, DVC's cache and a remote."""

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from reprotune.comparison import revisions
from reprotune.comparison.scores import MODELS
from reprotune.errors import InputError
from reprotune.records import read_json, write_json
from tests.clones import DVC, call
from tests.comparison.cells import with_benchmarks, write_scores

HALF = [1, 0] * 20
SAME = dict.fromkeys(MODELS, HALF)


def scored_repository(folder, benchmarks: dict[str, dict[str, list[float]]]) -> None:
    """A git repository with committed scores, and a remote."""
    folder.mkdir()
    call("git", "init", "-q", "-b", "main", cwd=folder)
    call(*DVC, "init", "-q", cwd=folder)
    call(*DVC, "remote", "add", "-d", "-q", "shared", str(folder.parent / "remote"), cwd=folder)
    score(folder, benchmarks)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "first", cwd=folder)


def score(folder, benchmarks: dict[str, dict[str, list[float]]]) -> None:
    """Replace the cells by what a run of `evaluate` leaves, recorded in dvc.lock."""
    for outs in ("metrics", "evals"):
        shutil.rmtree(folder / outs, ignore_errors=True)
    for name, correct in benchmarks.items():
        write_scores(folder, name, correct)
    shutil.rmtree(folder / "contamination")
    (folder / ".gitignore").write_text("evals/\n")
    stages = {
        f"evaluate-{model}-{name}": {
            "cmd": "true",
            "outs": [f"evals/{model}/{name}.parquet"],
            "metrics": [{f"metrics/{model}/{name}.json": {"cache": False}}],
        }
        for name in benchmarks
        for model in MODELS
    }
    with (folder / "dvc.yaml").open("w") as file:
        YAML().dump({"stages": stages}, file)
    call(*DVC, "commit", "-q", "--force", cwd=folder)


def against(revision: str, *benchmarks: str) -> str:
    return revisions.against(with_benchmarks(*benchmarks), revision, Path("metrics"), Path("evals"))


def test_a_change_between_revisions_is_real_or_not(tmp_path, monkeypatch):
    """Against a branch with a slash in its name, like an experiment's, whose samples are only on the remote.

    Benchmarks that only one side has are named.
    """
    folder = tmp_path / "clone"
    scored_repository(folder, {"a": SAME, "old": SAME})
    call("git", "branch", "tried/first", cwd=folder)
    call(*DVC, "push", "-q", cwd=folder)
    score(folder, {"a": SAME | {"dpo": [1] * 40}, "new": SAME})
    shutil.rmtree(folder / ".dvc" / "cache")
    call(*DVC, "commit", "-q", "--force", cwd=folder)
    monkeypatch.chdir(folder)
    printed = against("tried/first", "a", "new")
    assert "dpo: now − tried/first: the mean score rose (+50.0 [" in printed
    assert "sft: now − tried/first: the mean score shows no difference (+0.0 p 1.000" in printed
    assert "new is left out: tried/first has no scores of it" in printed
    assert "old is left out: only tried/first has it" in printed
    shutil.rmtree(tmp_path / "remote")
    shutil.rmtree(folder / ".dvc" / "cache")
    with pytest.raises(
        InputError,
        match=r"nothing can be compared\n.*\na is left out: evals/base/a\.parquet of tried/first is in no "
        "cache and on no remote",
    ):
        against("tried/first", "a")


def test_unknown_revisions_and_edited_files_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "clone"
    scored_repository(folder, {"a": SAME})
    monkeypatch.chdir(folder)
    for revision in ("", " ", "nonsense"):
        with pytest.raises(
            InputError, match=f"--against: found '{revision}', expected a git revision, or an experiment"
        ):
            against(revision, "a")
    file = folder / "metrics" / "sft" / "a.json"
    write_json(file, read_json(file) | {"score": 1.0})
    with pytest.raises(
        InputError,
        match=r"metrics/sft/a\.json: its content is not the one that dvc\.lock records; "
        "`dvc repro` makes it again",
    ):
        against("HEAD", "a")
    file.unlink()
    with pytest.raises(FileNotFoundError):
        against("HEAD", "a")
