"""The code, params, files and libraries that dvc.lock records for a stage are those that made its outs."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from reprotune import dvc_yaml
from reprotune.errors import InputError
from reprotune.fingerprints import locked_versions
from reprotune.pipeline import guard
from tests.clones import DVC, ENVIRONMENT, call, own_copy, with_params


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory):
    return own_copy(finished, tmp_path_factory.mktemp("guard") / "clone")


def begun(folder, line: str, *options: str) -> tuple[subprocess.Popen, str]:
    """Start SFT under DVC, and return once it has printed `line`."""
    process = subprocess.Popen(
        [*DVC, "repro", "--force", "--no-run-cache", "--single-item", "sft", *options],
        cwd=folder,
        env=ENVIRONMENT | {"REPROTUNE_CHECKPOINT_SECONDS": "0"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    printed = ""
    while line not in printed and (part := process.stdout.readline()):
        printed += part
    return process, printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pattern", "edit", "dep"),
    [
        ("params.yaml", r"(?m)^  r: 4$", "  r: 8", "params.yaml:lora"),
        ("templates/chatml.jinja", r"\Z", "\n", "templates/chatml.jinja"),
    ],
)
def test_what_is_edited_while_a_stage_runs_is_not_recorded(name, pattern, edit, dep, clone, tmp_path):
    """Once the edit is undone, the stage resumes from its checkpoint and ends with the same bytes."""
    folder = own_copy(clone, tmp_path / "clone")
    lock = (folder / "dvc.lock").read_text()
    process, printed = begun(folder, "'loss'")
    file = folder / name
    before = file.read_text()
    file.write_text(re.sub(pattern, edit, before, count=1))
    printed += process.communicate()[0]
    assert process.returncode != 0, printed[-3000:]
    assert f"error: {dep}: changed while sft ran" in printed and "Traceback" not in printed, printed[-3000:]
    assert (folder / "dvc.lock").read_text() == lock
    file.write_text(before)
    again = call(*DVC, "repro", "--force", "--no-run-cache", "--single-item", "sft", cwd=folder).stdout
    assert "resuming from checkpoint-" in again, again
    assert (folder / "dvc.lock").read_text() == lock


@pytest.mark.slow
@pytest.mark.slow
def test_data_that_is_edited_while_a_stage_runs_is_not_recorded(clone, tmp_path):
    """What another stage made; a file that was only touched is the same."""
    folder = own_copy(clone, tmp_path / "clone")
    file = folder / "models" / "sft" / "adapter_config.json"
    before = file.read_bytes()
    for content, status in ((before + b" ", 255), (before, 0)):
        process = subprocess.Popen(
            [*DVC, "repro", "--force", "--single-item", "dpo"],
            cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        printed = ""
        while "measuring train before" not in printed and (line := process.stdout.readline()):
            printed += line
        file.unlink()
        file.write_bytes(content)
        printed += process.communicate(timeout=120)[0]
        assert process.returncode == status, printed
        assert ("error: models/sft: changed while dpo ran" in printed) == (status != 0), printed


def test_code_that_is_edited_while_a_stage_runs_waits_for_the_next_run(clone, tmp_path):
    """The stage has loaded its code and recorded its fingerprint; the edit makes `code` stale."""
    folder = own_copy(clone, tmp_path / "clone")
    lock = (folder / "dvc.lock").read_text()
    process, printed = begun(folder, "'loss'")
    file = folder / "reprotune" / "training" / "ordering.py"
    file.write_text(file.read_text() + "\nMORE = 1\n")
    printed += process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    assert (folder / "dvc.lock").read_text() == lock
    assert "code:\n" in call(*DVC, "status", cwd=folder).stdout


def test_what_a_stage_does_not_read_may_be_edited_while_it_runs(clone, tmp_path, monkeypatch):
    monkeypatch.chdir(own_copy(clone, tmp_path / "clone"))
    folder = tmp_path / "clone"
    with guard.guarded("report"):
        with_params(folder, dpo__beta=0.1, evaluate__batch_tokens=1)
        (folder / "templates" / "chatml.jinja").write_text("another")
    with (
        pytest.raises(InputError, match=r"params\.yaml:dpo: changed while report ran"),
        guard.guarded("report"),
    ):
        with_params(folder, dpo__beta=0.2)


def test_another_version_than_the_lock_says_is_refused(clone, tmp_path):
    folder = own_copy(clone, tmp_path / "clone")
    file = folder / "requirements.lock"
    installed = locked_versions(file)["lm_eval"]
    file.write_text(re.sub(r"(?m)^lm[-_]eval==.*$", "lm-eval==0.0.1", file.read_text()))
    result = call(*DVC, "repro", "evaluate@base-gsm8k", cwd=folder, check=False)
    assert "Running stage 'code'" in result.stdout
    expected = (
        f"error: requirements.lock: lm_eval: found '0.0.1', installed is {installed}; `make setup` installs"
    )
    assert expected in result.stdout, result.stdout


def test_other_code_than_was_fingerprinted_is_refused(clone, tmp_path, monkeypatch):
    """Only DVC records a stage, so only its runs are checked."""
    folder = own_copy(clone, tmp_path / "clone")
    file = folder / "reprotune" / "comparison" / "table.py"
    file.write_text(file.read_text() + "\nMORE = 1\n")
    result = call(*DVC, "repro", "--single-item", "--force", "compare", cwd=folder, check=False)
    message = (
        "error: code.yaml: the code of compare changed since its fingerprint was taken; `dvc repro` takes"
    )
    assert message in result.stdout and "Traceback" not in result.stdout, result.stdout
    (folder / "comment.py").write_text("")
    file.write_text(file.read_text().replace("\nMORE = 1\n", "\n# more\n"))
    # as in a clone or an unpacked archive from a machine whose clock is ahead
    os.utime(file, (2**32, 2**32))
    assert "Traceback" not in call(*DVC, "repro", "--single-item", "--force", "compare", cwd=folder).stdout


def test_launched_processes_begin_with_what_the_first_one_read(clone, monkeypatch):
    monkeypatch.chdir(clone)
    monkeypatch.setenv(guard.BEGUN, "")
    guard.check_launched("sft", {"params.yaml:seed": 42})
    monkeypatch.setenv(guard.LAUNCHED, "1")
    guard.check_launched("sft", {"params.yaml:seed": 42})
    with pytest.raises(InputError, match="deps or params of sft changed while its processes started"):
        guard.check_launched("sft", {"params.yaml:seed": 43})


def test_dvc_may_be_called_in_another_folder(clone, tmp_path):
    """DVC then puts the path of dvc.yaml before the name of a stage."""
    folder = own_copy(clone, tmp_path / "clone")
    printed = call(
        *DVC, "repro", "--force", "--single-item", "../dvc.yaml:check_params", cwd=folder / "docs"
    ).stdout
    assert "Running stage '../dvc.yaml:check_params'" in printed and "params.yaml is valid" in printed


@pytest.mark.parametrize("content", ["", "a: [", "seed: 1\n", "model:\ndata: {sft: {sources:}}\n"])
def test_params_that_are_being_saved_are_named(content, clone, monkeypatch):
    monkeypatch.chdir(clone)
    before = Path("params.yaml").read_text()
    try:
        Path("params.yaml").write_text(content)
        for name in ("sft", "fetch_sft_data@rows", "evaluate@dpo-gsm8k"):
            with pytest.raises(InputError, match=r"params\.yaml: it lacks a value|found no stage"):
                guard.state(name)
    finally:
        Path("params.yaml").write_text(before)


def test_a_stage_that_is_no_longer_there_is_named(clone, monkeypatch):
    monkeypatch.chdir(clone)
    for name in ("nonsense", "evaluate@dpo-nonsense"):
        with pytest.raises(InputError, match=f"dvc.yaml: found no stage {name}, which DVC runs"):
            dvc_yaml.declared(name)
