"""Kill a training stage anywhere: what goes on from its checkpoint ends with the bytes of a run that was left alone."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages import checkpoints, command, dpo, params, reference, sft
from tests import steps, tiny
from tests.conftest import changed

MAIN = {"sft": sft.main, "reference": reference.main, "dpo": dpo.main}
ARGUMENTS = {
    "sft": "--data {0}/sft_tokens --launch-config {1} --metrics {2}/sft.json --curves {2}/sft.csv --speed {2}/sft_speed.csv --out {2}/sft",
    "reference": "--adapter {0}/sft --data {0}/dpo_tokens --out {2}/reference",
    "dpo": "--adapter {0}/sft --data {0}/dpo_tokens --reference {0}/reference --launch-config {1} --metrics {2}/dpo.json --curves {2}/dpo.csv"
    " --speed {2}/dpo_speed.csv --out {2}/dpo",
}
# each stage runs in a process of its own, forked from one that has torch and TRL loaded, which takes longer than the tiny model's training
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])
NEVER = 600.0


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A folder with a params.yaml that trains NF4 with dropout for some steps, and every stage's inputs and undisturbed outs."""
    folder = tmp_path_factory.mktemp("ready")
    tiny.make_world(folder)
    settings = changed(params.load(folder / "params.yaml"), {"lora.dropout": 0.1, "sft.epochs": 5.0, "dpo.steps": 16, "reference.batch_size": 1})
    content = settings.model_dump()
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    base = folder / "tiny" / "model"
    steps.tokenize_sft(settings, base, tiny.alpaca_rows(), folder)
    steps.tokenize_dpo(settings, base, tiny.preference_rows(200), folder)
    for stage in MAIN:
        assert finished(start(stage, folder, folder, NEVER)) == 0, printed(folder)
    return folder


def start(stage: str, ready: Path, out: Path, seconds: float = 0.0) -> BaseProcess:
    """Run a stage on the inputs in `ready` with its outs under `out`, where its checkpoints lie too; it saves every so many seconds."""
    out.mkdir(exist_ok=True)
    if not (out / "params.yaml").exists():
        shutil.copy(ready / "params.yaml", out / "params.yaml")
    arguments = f"--base {ready}/tiny/model --templates {steps.TEMPLATES} " + ARGUMENTS[stage].format(ready, steps.LAUNCH, out)
    process = FORKED.Process(target=run, args=(stage, arguments.split(), out, seconds))
    process.start()
    return process


def run(stage: str, arguments: list[str], out: Path, seconds: float) -> None:
    import torch

    log = os.open(out / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(out)
    torch.set_num_threads(1)
    checkpoints.SECONDS = seconds
    sys.argv = [stage, *arguments]
    command(MAIN[stage])


def printed(out: Path) -> str:
    return (out / "printed").read_text()


def finished(process: BaseProcess) -> int:
    process.join()
    return process.exitcode


def outs(stage: str, folder: Path) -> dict[str, bytes]:
    files = [file for file in (folder / stage).rglob("*") if file.is_file()]
    files += [file for file in (folder / f"{stage}.json", folder / f"{stage}.csv") if file.exists()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def saved(stage: str, out: Path) -> list[Path]:
    """What a killed run could go on from: sealed checkpoints, or the reference pass's progress."""
    found = (out / checkpoints.FOLDER / stage).glob("*/*.json" if stage == "reference" else "*/checkpoint-*/manifest.json")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def killed_after(stage: str, ready: Path, out: Path, count: int, delay: float = 0.0) -> None:
    """Start a stage and kill it a little after it has saved `count` times more."""
    process = start(stage, ready, out)
    seen: set[tuple[str, float]] = {(str(path), path.stat().st_mtime) for path in saved(stage, out)}
    new = 0
    while new < count and process.is_alive():
        for path in saved(stage, out):
            try:
                key = (str(path), path.stat().st_mtime)
            except FileNotFoundError:
                continue
            new += key not in seen
            seen.add(key)
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()


@pytest.mark.parametrize("stage", MAIN)
def test_a_killed_run_ends_with_the_same_bytes(stage, ready, tmp_path):
    kill_twice(stage, ready, tmp_path, random.Random(stage))


@pytest.mark.soak
@pytest.mark.parametrize("stage", MAIN)
def test_ten_kills_a_stage(stage, ready, tmp_path):
    rng = random.Random(f"ten {stage}")
    for number in range(5):
        kill_twice(stage, ready, tmp_path / str(number), rng)


def kill_twice(stage: str, ready: Path, out: Path, rng: random.Random) -> None:
    for _ in range(2):
        killed_after(stage, ready, out, rng.randint(1, 4), delay=0.1 * rng.random())
        assert not (out / stage).exists()
    kept = saved(stage, out)
    assert finished(start(stage, ready, out)) == 0, printed(out)
    assert not kept or "going on from" in printed(out)
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
    assert finished(start("sft", ready, tmp_path)) == 0, printed(tmp_path)
    for folder in (half, last.parent):
        assert f"{folder.name} is incomplete or damaged: passed over" in printed(tmp_path)
    assert f"going on from {before.parent.name}" in printed(tmp_path)
    assert outs("sft", tmp_path) == outs("sft", ready)


def test_sigterm_saves_first(ready, tmp_path):
    process = start("sft", ready, tmp_path, NEVER)
    while process.is_alive() and not ((tmp_path / "printed").exists() and "'loss'" in printed(tmp_path)):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert finished(process) == 1
    assert "ended by SIGTERM at step" in printed(tmp_path) and "`dvc repro` goes on from there" in printed(tmp_path)
    assert len(saved("sft", tmp_path)) == 1
    assert finished(start("sft", ready, tmp_path, NEVER)) == 0
    assert "going on from checkpoint-" in printed(tmp_path)
    assert outs("sft", tmp_path) == outs("sft", ready)


def test_other_params_take_up_no_checkpoint(ready, tmp_path):
    killed_after("sft", ready, tmp_path, 2)
    text = (ready / "params.yaml").read_text()
    assert "learning_rate: 0.0002" in text
    (tmp_path / "params.yaml").write_text(text.replace("learning_rate: 0.0002", "learning_rate: 0.0003"))
    assert finished(start("sft", ready, tmp_path, NEVER)) == 0
    assert "going on from" not in printed(tmp_path)
    assert outs("sft", tmp_path) != outs("sft", ready)
