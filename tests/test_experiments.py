"""`dvc exp` as people use it, on a finished tiny run: nothing of an experiment lands in the main workspace until it is taken over."""

import csv
import io
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from stages.records import read_json
from tests.clones import DVC, ENVIRONMENT, call, of_experiment, own_copy

SHOW = ["exp", "show", "--only-changed", "--drop", ".*", "--keep", "Experiment|all.mean.(sft|dpo).score|held_out_margin|dpo.beta|sft.learning_rate"]
"""As the docs have it: columns that fit a screen."""


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory) -> Path:
    return own_copy(finished, tmp_path_factory.mktemp("experiments") / "clone")


def queued(folder: Path, jobs: int, patience: int) -> str:
    """Run what is queued, and return what `dvc queue status` says in the end."""
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
    """What `dvc exp show` has of each, by name."""
    printed = subprocess.run([*DVC, *SHOW, "--csv"], cwd=folder, env=ENVIRONMENT, text=True, capture_output=True, check=True).stdout
    return {row["Experiment"]: row for row in csv.DictReader(io.StringIO(printed)) if row["Experiment"]}


def test_a_queue_of_values_runs_side_by_side(clone):
    """Each in a folder of its own, with its own code; and one is taken over, branched off and pushed."""
    before = {file: file.stat().st_mtime_ns for name in ("data", "models", "evals", "metrics", "plots", "report", "provenance") for file in (clone / name).rglob("*")}
    call(*DVC, "exp", "run", "--queue", "-S", "dpo.beta=0.2,0.5", cwd=clone)
    code = (clone / "stages" / "report.py").read_text()
    # what is queued has the code that it was queued with
    (clone / "stages" / "report.py").write_text("raise SystemExit('the code of the main workspace')\n")
    status = queued(clone, 2, 500)
    assert status.count("Success") == 2, status
    (clone / "stages" / "report.py").write_text(code)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert call("git", "status", "--porcelain", cwd=clone).stdout == ""
    found = experiments(clone)
    assert sorted(row["dpo.beta"] for row in found.values()) == ["0.2", "0.5"]
    header = max(len(line) for line in call(*DVC, *SHOW, "--md", cwd=clone).stdout.splitlines())
    assert header < 140
    name = next(name for name, row in found.items() if row["dpo.beta"] == "0.5")
    call(*DVC, "exp", "apply", name, cwd=clone)
    assert "beta: 0.5" in (clone / "params.yaml").read_text()
    assert read_json(clone / "provenance" / "dpo.json")["params"]["params.yaml:dpo"]["beta"] == 0.5
    assert "up to date" in call(*DVC, "repro", cwd=clone).stdout
    diff = call(*DVC, "metrics", "diff", cwd=clone).stdout
    assert "metrics/train/dpo.json" in diff and "held_out_margin" in diff
    call(*DVC, "exp", "branch", name, "stronger", cwd=clone)
    assert "beta: 0.5" in call("git", "show", "stronger:params.yaml", cwd=clone).stdout
    # a colleague gets it with its outs
    hub, storage = clone.parent / "hub.git", clone.parent / "storage"
    call("git", "init", "-q", "--bare", str(hub), cwd=clone.parent)
    call("git", "remote", "set-url", "origin", str(hub), cwd=clone)
    call("git", "push", "-q", "origin", "HEAD", cwd=clone)
    call(*DVC, "remote", "modify", "--local", "shared", "url", str(storage), cwd=clone)
    call(*DVC, "exp", "push", "origin", name, cwd=clone)
    other = clone.parent / "other"
    call("git", "clone", "-q", str(hub), str(other), cwd=clone.parent)
    call(*DVC, "remote", "modify", "--local", "shared", "url", str(storage), cwd=other)
    call(*DVC, "exp", "pull", "origin", name, cwd=other)
    call(*DVC, "exp", "apply", name, cwd=other)
    assert (other / "models" / "dpo" / "adapter_model.safetensors").read_bytes() == (clone / "models" / "dpo" / "adapter_model.safetensors").read_bytes()


@pytest.mark.soak
def test_a_sweep_over_two_values(finished, tmp_path):
    """Of what SFT does and of what DPO does: the runs that share an SFT model train it once."""
    folder = own_copy(finished, tmp_path / "clone")
    call(*DVC, "exp", "run", "--queue", "-S", "sft.learning_rate=1e-4,3e-4", "-S", "dpo.beta=0.2,0.5", cwd=folder)
    assert queued(folder, 2, 1500).count("Success") == 4
    found = experiments(folder)
    assert len(found) == 4 and len({(row["sft.learning_rate"], row["dpo.beta"]) for row in found.values()}) == 4
    assert len({of_experiment(folder, name, "metrics/train/sft.json") for name in found}) == 2
    assert len({of_experiment(folder, name, "metrics/train/dpo.json") for name in found}) == 4
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(process.info["cmdline"] or [])]
