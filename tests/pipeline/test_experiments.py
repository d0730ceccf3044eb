"""`dvc exp` on a finished tiny run: an experiment changes the workspace only when it is applied."""

import csv
import io
import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from reprotune.data.sources import local_sha256
from tests.clones import DVC, ENVIRONMENT, call, of_experiment, own_copy

SHOW = ["exp", "show", "--only-changed"]


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory) -> Path:
    return own_copy(finished, tmp_path_factory.mktemp("experiments") / "clone")


def queued(folder: Path, jobs: int, patience: int) -> str:
    """Run the queued experiments, and return the last output of `dvc queue status`."""
    call(*DVC, "queue", "start", "-j", str(jobs), cwd=folder)
    begin = time.monotonic()
    while time.monotonic() - begin < patience:
        status = call(*DVC, "queue", "status", cwd=folder).stdout
        if "Queued" not in status and "Running" not in status:
            return status
        time.sleep(3)
    call(*DVC, "queue", "stop", "--kill", cwd=folder, check=False)
    raise AssertionError(f"not done after {patience} s:\n{status}")


def experiments(folder: Path) -> dict[str, dict[str, str]]:
    """The row of each experiment in `dvc exp show`, by name."""
    printed = subprocess.run(
        [*DVC, *SHOW, "--csv"], cwd=folder, env=ENVIRONMENT, text=True, capture_output=True, check=True
    ).stdout
    return {row["Experiment"]: row for row in csv.DictReader(io.StringIO(printed)) if row["Experiment"]}


@pytest.mark.slow
def test_a_queued_value_runs_beside_the_workspace(clone):
    """It runs in a folder of its own with the code that it was queued with; it is applied and pushed."""
    before = {
        file: file.stat().st_mtime_ns
        for name in ("data", "models", "evals", "metrics", "plots", "report")
        for file in (clone / name).rglob("*")
    }
    call(*DVC, "exp", "run", "--queue", "-S", "dpo.beta=0.5", cwd=clone)
    code = (clone / "stages" / "report.py").read_text()
    (clone / "stages" / "report.py").write_text("raise SystemExit('the code of the main workspace')\n")
    status = queued(clone, 1, 500)
    assert status.count("Success") == 1, status
    (clone / "stages" / "report.py").write_text(code)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert call("git", "status", "--porcelain", cwd=clone).stdout == ""
    rows = experiments(clone)
    assert [row["dpo.beta"] for row in rows.values()] == ["0.5"]
    table = subprocess.run(
        [*DVC, *SHOW, "--no-pager"],
        cwd=clone,
        env=ENVIRONMENT | {"COLUMNS": "600"},
        text=True,
        capture_output=True,
    ).stdout
    # behind the metrics and params that changed, DVC shows the hashes of changed files
    header = table.splitlines()[1]
    assert 0 < header.index("dpo.beta") < 150 and "…" not in header, header
    (name,) = rows
    call(*DVC, "exp", "apply", name, cwd=clone)
    assert "beta: 0.5" in (clone / "params.yaml").read_text()
    assert "up to date" in call(*DVC, "repro", cwd=clone).stdout
    diff = call(*DVC, "metrics", "diff", cwd=clone).stdout
    assert "metrics/train/dpo.json" in diff and "held_out_margin" in diff
    assert len(diff.splitlines()) <= 15, diff
    call(*DVC, "exp", "branch", name, "stronger", cwd=clone)
    assert "beta: 0.5" in call("git", "show", "stronger:params.yaml", cwd=clone).stdout
    # a colleague pulls it with its outs
    hub, storage = clone.parent / "hub.git", clone.parent / "storage"
    call("git", "init", "-q", "--bare", str(hub), cwd=clone.parent)
    call("git", "remote", "set-url", "origin", str(hub), cwd=clone)
    call("git", "push", "-q", "origin", "HEAD", cwd=clone)
    call(*DVC, "remote", "modify", "--local", "shared", "url", str(storage), cwd=clone)
    call(*DVC, "exp", "push", "origin", name, cwd=clone)
    colleague = clone.parent / "colleague"
    call("git", "clone", "-q", str(hub), str(colleague), cwd=clone.parent)
    call(*DVC, "remote", "modify", "--local", "shared", "url", str(storage), cwd=colleague)
    call(*DVC, "exp", "pull", "origin", name, cwd=colleague)
    call(*DVC, "exp", "apply", name, cwd=colleague)
    pushed, pulled = (
        (folder / "models" / "dpo" / "adapter_model.safetensors").read_bytes()
        for folder in (clone, colleague)
    )
    assert pulled == pushed


@pytest.mark.slow
def test_an_experiment_reads_what_git_does_not_track(finished, tmp_path):
    """It runs in a copy of what git tracks, here in a clone that was never set up."""
    folder = own_copy(finished, tmp_path / "project" / "clone")
    rows = [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in range(20)]
    (folder / "mine").mkdir()
    for path in (folder / "mine" / "rows.json", folder.parent / "rows.json"):
        path.write_text(json.dumps(rows))
        source = {"path": os.path.relpath(path, folder), "sha256": local_sha256(path)}
        options = [f"-S data.sft.sources.rows.source.{key}={value}" for key, value in source.items()]
        command = ["exp", "run", "--temp", *" ".join(options).split(), "fetch_sft_data"]
        printed = call(*DVC, *command, cwd=folder).stdout
        assert "rows: 20 rows" in printed and "Ran experiment(s)" in printed, printed
        # others, so that DVC does not take them from its run cache
        rows.pop()
        rows.append(rows[0] | {"output": "another"})


@pytest.mark.soak
def test_a_sweep_over_two_values(finished, tmp_path):
    """A value of SFT and a value of DPO vary: the runs that share an SFT model train it once."""
    folder = own_copy(finished, tmp_path / "clone")
    values = ["-S", "sft.learning_rate=1e-4,3e-4", "-S", "dpo.beta=0.2,0.5"]
    call(*DVC, "exp", "run", "--queue", *values, cwd=folder)
    assert queued(folder, 2, 1500).count("Success") == 4
    rows = experiments(folder)
    assert len(rows) == 4
    assert len({(row["sft.learning_rate"], row["dpo.beta"]) for row in rows.values()}) == 4
    assert len({of_experiment(folder, name, "metrics/train/sft.json") for name in rows}) == 2
    assert len({of_experiment(folder, name, "metrics/train/dpo.json") for name in rows}) == 4
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or [])
    ]
