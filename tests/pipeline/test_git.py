"""A run in git: merges of branches that were both run, and bytes that no setting of git changes."""

import shutil
import sys
from pathlib import Path

import pytest

from reprotune import dvc_lock
from reprotune.errors import InputError
from reprotune.records import read_metrics
from tests.clones import DVC, call, own_copy, with_params
from tests.tiny import ROOT

COMMANDS = (
    "plan",
    "plan dpo.beta",
    "fsck",
    "lineage metrics/dpo/gsm8k.json",
    "lineage all.mean.dpo.score",
    "compare --against HEAD",
    "cells",
)
MARKERS = b"<<<<<<< "


@pytest.fixture(scope="module")
def branches(finished, tmp_path_factory) -> Path:
    """A clone with two branches, each with a finished run of its own; `two` is checked out."""
    folder = own_copy(finished, tmp_path_factory.mktemp("branches") / "clone")
    for branch, benchmark in (("one", "arc_challenge"), ("two", "gsm8k")):
        call("git", "checkout", "-q", "-b", branch, "origin/HEAD", cwd=folder)
        call(*DVC, "checkout", "-q", cwd=folder)
        with_params(folder, **{f"benchmarks__{benchmark}__limit": 5})
        call(*DVC, "repro", cwd=folder)
        call("git", "commit", "-qam", branch, cwd=folder)
    return folder


def merged(branches: Path, folder: Path, attributes: str) -> Path:
    """A copy in which `one` has been merged into `two`, with conflicts.

    Args:
        attributes: of git, in this clone alone.
    """
    shutil.copytree(branches, folder, symlinks=True)
    (folder / ".git" / "info" / "attributes").write_text(attributes)
    result = call("git", "merge", "one", cwd=folder, check=False)
    assert "CONFLICT (content): Merge conflict in dvc.lock" in result.stdout, result.stdout
    return folder


def reprotune(folder: Path, command: str) -> tuple[int, str]:
    result = call(sys.executable, "-m", "reprotune", *command.split(), cwd=folder, check=False)
    assert "Traceback" not in result.stdout, result.stdout
    return result.returncode, result.stdout


def check_finished(folder: Path) -> None:
    """The merge has the changes of both branches, and a clone of it is up to date."""
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "merged", cwd=folder)
    for benchmark in ("arc_challenge", "gsm8k"):
        assert read_metrics(folder / "metrics" / "dpo" / f"{benchmark}.json")["n"] == 5
    other = own_copy(folder, folder.parent / "other")
    for clone in (folder, other):
        assert "up to date" in call(*DVC, "status", cwd=clone).stdout
        assert "nothing is wrong" in reprotune(clone, "fsck")[1].splitlines()


@pytest.mark.slow
def test_two_runs_are_merged_by_one_command(branches, tmp_path):
    """The merge keeps this side's outs whole, so that commands work, and the run cache has both runs."""
    folder = merged(branches, tmp_path / "clone", "")
    files = call("git", "diff", "--name-only", "--diff-filter=U", cwd=folder).stdout.split()
    assert files and not [name for name in files if MARKERS in (folder / name).read_bytes()]
    for command in COMMANDS[:-2]:
        status, printed = reprotune(folder, command)
        assert status == 0 or command == "fsck", printed
    status, printed = reprotune(folder, "compare --against HEAD")
    assert status == 1 and "its content is not the one that dvc.lock records; `dvc repro` makes it" in printed
    printed = call(*DVC, "repro", cwd=folder).stdout
    assert "Running stage 'evaluate" not in printed and printed.count(" is cached - skipping run") == 3, (
        printed
    )
    check_finished(folder)


@pytest.mark.slow
def test_conflict_markers_are_named_with_the_way_out(branches, tmp_path):
    """As where another program has merged, or a branch is from before the project's attributes."""
    folder = merged(branches, tmp_path / "clone", "* merge\n")
    assert MARKERS in (folder / "dvc.lock").read_bytes()
    assert MARKERS in (folder / "metrics" / "summary.json").read_bytes()
    for command in COMMANDS:
        status, printed = reprotune(folder, command)
        assert status == 1 and "`git checkout HEAD dvc.lock` brings the last one back" in printed, printed
    call("git", "checkout", "HEAD", "dvc.lock", cwd=folder)
    for command in COMMANDS[:-2]:
        reprotune(folder, command)
    status, printed = reprotune(folder, "lineage all.mean.dpo.score")
    assert status == 1 and "not a JSON file" in printed and "`dvc repro` makes it anew" in printed
    call(*DVC, "repro", cwd=folder)
    check_finished(folder)


@pytest.mark.parametrize("content", ["", "schema: '2.0'\n", "stages: []\n", "[]", "a: 'b", "\x00", MARKERS])
def test_a_lock_file_that_is_none_is_named(content, tmp_path):
    lock = tmp_path / "dvc.lock"
    lock.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"dvc\.lock: not a lock file of DVC \(.*`git checkout HEAD .*lock`"):
        dvc_lock.read_stages(lock)


def test_a_conflict_in_the_params_is_named(finished, tmp_path):
    folder = own_copy(finished, tmp_path / "clone")
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(f"<<<<<<< HEAD\n{text}=======\nseed: 7\n>>>>>>> theirs\n")
    for command in ("plan", "fsck", "cells", "compare --against HEAD"):
        status, printed = reprotune(folder, command)
        assert status == 1 and "params.yaml: line 1 is the mark of a merge conflict" in printed, printed


def test_an_empty_lock_file_is_named(finished, tmp_path):
    """As a machine that stopped while DVC wrote it may leave it."""
    folder = own_copy(finished, tmp_path / "clone")
    (folder / "dvc.lock").write_text("")
    for command in ("lineage metrics/dpo/gsm8k.json", "compare --against HEAD"):
        status, printed = reprotune(folder, command)
        assert status == 1 and printed.startswith("error: dvc.lock: not a lock file of DVC ("), printed
        assert "`git checkout HEAD dvc.lock` brings the last one back" in printed


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.autocrlf=input", "core.eol=crlf"])
def test_git_converts_no_line_ending(setting, finished, tmp_path):
    """Of what stages read and made, and of a user's rows, which may have both kinds."""
    folder = own_copy(finished, tmp_path / "clone", "-c", setting)
    assert "up to date" in call(*DVC, "status", cwd=folder).stdout
    content = b'{"a": 1}\r\n{"a": 2}\n'
    files = ("rows.jsonl", "report/samples.html", "metrics/a.json", "templates/mine.jinja")
    for name in files:
        (folder / name).write_bytes(content)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "rows", cwd=folder)
    call("git", "clone", "-q", "-c", setting, str(folder), str(tmp_path / "second"), cwd=folder)
    assert {(tmp_path / "second" / name).read_bytes() for name in files} == {content}
    assert (ROOT / ".gitattributes").read_bytes() == (tmp_path / "second" / ".gitattributes").read_bytes()
