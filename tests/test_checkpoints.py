"""Kill a training stage anywhere: what goes on from its checkpoint ends with the bytes of a run that was left alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages import checkpoints, params
from tests import steps, tiny
from tests.conftest import changed

STAGES = {
    "sft": "--data {0}/sft_tokens --launch-config {1} --metrics {2}/sft.json --curves {2}/sft.csv --speed {2}/sft_speed.csv --out {2}/sft",
    "reference": "--adapter {0}/sft --data {0}/dpo_tokens --out {2}/reference",
    "dpo": "--adapter {0}/sft --data {0}/dpo_tokens --reference {0}/reference --launch-config {1} --metrics {2}/dpo.json --curves {2}/dpo.csv"
    " --speed {2}/dpo_speed.csv --out {2}/dpo",
}


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A folder with a params.yaml that trains NF4 with dropout for some steps, and every stage's inputs and undisturbed outs."""
    folder = tmp_path_factory.mktemp("ready")
    tiny.make_world(folder)
    settings = changed(params.load(folder / "params.yaml"), {"lora.dropout": 0.1, "sft.epochs": 5.0, "dpo.steps": 16, "reference.batch_size": 1})
    content = settings.model_dump()
    from ruamel.yaml import YAML

    with (folder / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    base = folder / "tiny" / "model"
    steps.tokenize_sft(settings, base, tiny.alpaca_rows(), folder)
    steps.tokenize_dpo(settings, base, tiny.preference_rows(200), folder)
    for stage in STAGES:
        assert start(stage, folder, folder, seconds="600").wait() == 0
    return folder


def start(stage: str, ready: Path, out: Path, seconds: str = "0") -> subprocess.Popen:
    """Run a stage of `ready` with its outs under `out`, where its checkpoints lie too."""
    out.mkdir(exist_ok=True)
    if out != ready:
        shutil.copy(ready / "params.yaml", out / "params.yaml")
    command = f"-m stages.{stage} --base {ready}/tiny/model --templates {steps.TEMPLATES} " + STAGES[stage].format(ready, steps.LAUNCH, out)
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "REPROTUNE_CHECKPOINT_SECONDS": seconds, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command.split()], cwd=out, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def outs(stage: str, folder: Path) -> dict[str, bytes]:
    files = [file for file in (folder / stage).rglob("*") if file.is_file()]
    files += [file for file in (folder / f"{stage}.json", folder / f"{stage}.csv") if file.exists()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def saved(stage: str, out: Path) -> list[Path]:
    """What a killed run could go on from: sealed checkpoints, or the reference pass's progress."""
    found = (out / checkpoints.FOLDER / stage).glob("*/*.json" if stage == "reference" else "*/checkpoint-*/manifest.json")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def killed_after(stage: str, ready: Path, out: Path, count: int, how: signal.Signals = signal.SIGKILL, delay: float = 0.0) -> str:
    """Start a stage and kill it a little after it has saved `count` times more; returns what it printed."""
    process = start(stage, ready, out)
    seen: set[tuple[str, float]] = {(str(path), path.stat().st_mtime) for path in saved(stage, out)}
    new = 0
    while new < count and process.poll() is None:
        for path in saved(stage, out):
            try:
                key = (str(path), path.stat().st_mtime)
            except FileNotFoundError:
                continue
            new += key not in seen
            seen.add(key)
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(how)
    return process.communicate()[0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_with_the_same_bytes(stage, ready, tmp_path):
    rng = random.Random(stage)
    kill_twice(stage, ready, tmp_path, rng)


@pytest.mark.soak
@pytest.mark.parametrize("stage", STAGES)
def test_ten_kills_a_stage(stage, ready, tmp_path):
    rng = random.Random(f"ten {stage}")
    for number in range(5):
        kill_twice(stage, ready, tmp_path / str(number), rng)


def kill_twice(stage: str, ready: Path, out: Path, rng: random.Random) -> None:
    for _ in range(2):
        killed_after(stage, ready, out, rng.randint(1, 4), delay=0.1 * rng.random())
        assert not (out / stage).exists()
    kept = saved(stage, out)
    process = start(stage, ready, out)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    assert not kept or "going on from" in printed
    assert outs(stage, out) == outs(stage, ready)
    assert not saved(stage, out), "checkpoints are removed on success"


def test_a_damaged_checkpoint_is_passed_over(ready, tmp_path):
    killed_after("sft", ready, tmp_path, 3)
    *_, before, last = saved("sft", tmp_path)
    weights = last.parent / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (half := last.parent.with_name("checkpoint-99")).mkdir()
    (half / "optimizer.pt").write_bytes(b"half")
    process = start("sft", ready, tmp_path)
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    for folder in (half, last.parent):
        assert f"{folder.name} is incomplete or damaged: passed over" in printed
    assert f"going on from {before.parent.name}" in printed
    assert outs("sft", tmp_path) == outs("sft", ready)


def test_sigterm_saves_first(ready, tmp_path):
    process = start("sft", ready, tmp_path, seconds="600")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "'loss'" in line:
            break
    process.terminate()
    printed = "".join(lines) + process.communicate()[0]
    assert process.returncode == 1 and "ended by SIGTERM at step" in printed and "`dvc repro` goes on from there" in printed, printed[-3000:]
    assert len(saved("sft", tmp_path)) == 1
    process = start("sft", ready, tmp_path, seconds="600")
    assert "going on from checkpoint-" in process.communicate()[0]
    assert outs("sft", tmp_path) == outs("sft", ready)


def test_other_params_take_up_no_checkpoint(ready, tmp_path):
    killed_after("sft", ready, tmp_path, 2)
    process = subprocess.run([sys.executable, "-c", "pass"])
    changed_ready = tmp_path / "changed"
    changed_ready.mkdir()
    text = (ready / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("learning_rate: 0.0002", "learning_rate: 0.0003"))
    assert (tmp_path / "params.yaml").read_text() != text and process.returncode == 0
    command = f"-m stages.sft --base {ready}/tiny/model --templates {steps.TEMPLATES} " + STAGES["sft"].format(ready, steps.LAUNCH, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert result.returncode == 0 and "going on from" not in result.stdout
    assert outs("sft", tmp_path) != outs("sft", ready)
