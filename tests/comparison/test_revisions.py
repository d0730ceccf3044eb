"""Comparison with another revision, in a git repository with scores, DVC's cache and a remote."""

import os
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from reprotune.comparison import revisions
from reprotune.comparison.scores import MODELS
from reprotune.errors import InputError
from reprotune.pipeline import lineage
from reprotune.records import read_json, write_json
from tests.clones import DVC, call
from tests.comparison.cells import with_benchmarks, write_scores

HALF = [1, 0] * 20
SAME = dict.fromkeys(MODELS, HALF)


def scored_repository(folder, benchmarks: dict[str, dict[str, list[float]]], top: str = ".") -> None:
    """A git repository with committed scores, and a remote.

    Args:
        top: the git repository's folder, from this one.
    """
    folder.mkdir(parents=True)
    call("git", "init", "-q", "-b", "main", top, cwd=folder)
    call(*DVC, "init", "-q", *([] if top == "." else ["--subdir"]), cwd=folder)
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


def test_the_project_may_be_a_part_of_a_repository(tmp_path, monkeypatch):
    """Its paths begin at its own folder, and another project next to it may have the same."""
    folder = tmp_path / "all" / "deep" / "project"
    scored_repository(folder, {"a": SAME}, "../..")
    shutil.copytree(folder / "metrics", tmp_path / "all" / "metrics")
    call("git", "add", "-A", cwd=tmp_path / "all")
    call("git", "commit", "-qm", "another", cwd=tmp_path / "all")
    score(folder, {"a": SAME | {"sft": [1] * 40}})
    monkeypatch.chdir(folder)
    for revision in ("HEAD", "main~1"):
        assert f"sft: now − {revision}: the mean score rose (+50.0 [" in against(revision, "a")
    # from before there was a project
    tree = call("git", "hash-object", "-t", "tree", "-w", "/dev/null", cwd=folder).stdout.strip()
    commit = call("git", "commit-tree", "-m", "empty", tree, cwd=folder).stdout.strip()
    call("git", "branch", "empty", commit, cwd=folder)
    with pytest.raises(InputError, match="--against: found 'empty', expected a git revision"):
        against("empty", "a")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_repository_of_another_user_is_refused_in_words(tmp_path, monkeypatch):
    """Git does not trust it until the user says so, as on a disk that several users mount."""
    folder = tmp_path / "clone"
    scored_repository(folder, {"a": SAME})
    monkeypatch.chdir(folder)
    shutil.chown(folder, "nobody")
    shutil.chown(folder / ".git", "nobody")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("SUDO_UID", "GIT_CONFIG_GLOBAL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"git cannot open the repository .*; `git status` says what to do"):
        against("HEAD", "a")
    about = lineage.commit()
    assert about["commit"] == "none"
    assert f"git config --global --add safe.directory {folder}" in about["git"]
    call("git", "config", "--file", str(tmp_path / ".gitconfig"), "safe.directory", str(folder), cwd=tmp_path)
    assert lineage.commit().keys() == {"commit"}
