"""A command that fails prints one message; what is registered for success runs after success alone."""

import os
import subprocess
import sys

import pytest

from reprotune import process
from tests.tiny import ROOT


def python(code: str, cwd, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )


@pytest.mark.parametrize(
    ("main", "expected"),
    [
        ("__import__('pathlib').Path('/dev/full').write_text('x' * 100_000)", "the disk is full"),
        ("__import__('pandas').DataFrame({'a': range(10**6)}).to_parquet('/dev/full')", "the disk is full"),
        ("__import__('torch').save({}, '/dev/full')", "the disk is full"),
        # a write that fails in the middle of a file raises another error
        (
            "[__import__('resource').setrlimit(1, (2**14, 2**14)), "
            "__import__('torch').save(b'x' * 2**15, 'cut')]",
            "the disk is full",
        ),
        (
            "open('models/none/config.json')",
            "models/none/config.json: no such file; `dvc checkout` restores it",
        ),
    ],
)
def test_a_command_ends_in_one_message(main, expected, tmp_path):
    """/dev/full is a real device on which every write fails for lack of space."""
    code = f"from reprotune.process import command\ncommand(lambda: {main})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 1 and result.stderr.startswith("error: ") and expected in result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1


def test_what_is_left_for_the_end_runs_after_success_alone(tmp_path):
    code = (
        "from reprotune import process; "
        "process.command(lambda: (process.at_success(lambda: print('at the end')), {}))"
    )
    assert python(code.format("print('done')"), tmp_path).stdout == "done\nat the end\n"
    failed = python(code.format("open('nothing')"), tmp_path)
    assert failed.returncode == 1 and "at the end" not in failed.stdout


@pytest.mark.parametrize("launched", [True, False])
def test_a_launched_process_ends_without_finalization(launched, tmp_path, monkeypatch):
    monkeypatch.setenv("REPROTUNE_LAUNCHED", "1") if launched else None
    code = "import atexit; from reprotune import process; atexit.register(print, 'finalized')\n"
    result = python(f"{code}process.command(lambda: print('done', end=' '))", tmp_path)
    assert result.returncode == 0
    assert result.stdout == "done " + ("" if launched else "finalized\n")
    failed = python(f"{code}process.command(lambda: open('/none'))", tmp_path)
    assert failed.returncode == 1 and "no such file" in failed.stderr


def test_without_a_command_it_runs_at_once():
    ran = []
    process.at_success(lambda: ran.append(True))
    assert ran == [True]


def test_every_path_of_a_stage_is_needed(tmp_path):
    code = "from reprotune import process; print(process.arguments('What it does.', 'base', 'out'))"
    printed = python(code, tmp_path, "--base", "a", "--out", "b").stdout
    assert "base=PosixPath('a'), out=PosixPath('b')" in printed
    assert "the following arguments are required: --out" in python(code, tmp_path, "--base", "a").stderr
