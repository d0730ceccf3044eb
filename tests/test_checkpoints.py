"""Kill a training stage anywhere: what goes on from its checkpoint ends with the bytes of a run that was left alone."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
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
    "sft": "--data {0}/sft_tokens --configs {1} --checkpoints {2}/checkpoints/sft --metrics {2}/sft.json --plots {2} --out {2}/sft",
    "reference": "--adapter {0}/sft --data {0}/dpo_tokens --configs {1} --checkpoints {2}/checkpoints/reference --out {2}/reference",
    "dpo": "--adapter {0}/sft --data {0}/dpo_tokens --reference {0}/reference --configs {1} --checkpoints {2}/checkpoints/dpo --metrics {2}/dpo.json --plots {2} --out {2}/dpo",
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
    arguments = f"--base {ready}/tiny/model --templates {steps.TEMPLATES} " + ARGUMENTS[stage].format(ready, steps.CONFIGS, out)
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
    os.environ["REPROTUNE_CHECKPOINT_SECONDS"] = str(seconds)
    sys.argv = [stage, *arguments]
    command(MAIN[stage])


def printed(out: Path) -> str:
    return (out / "printed").read_text()


def finished(process: BaseProcess) -> int:
    process.join()
    return process.exitcode


def outs(stage: str, folder: Path) -> dict[str, bytes]:
    files = [file for file in (folder / stage).rglob("*") if file.is_file()]
    files += [file for name in (f"{stage}.json", f"{stage}.csv", f"{stage}_held_out.csv") if (file := folder / name).exists()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def saved(stage: str, out: Path) -> set[Path]:
    """The checkpoints that a killed run could go on from; unlike rglob, os.walk bears one that is removed meanwhile."""
    found = (Path(folder) for folder, _, files in os.walk(out / "checkpoints" / stage) if "manifest.json" in files)
    return {folder for folder in found if folder.name.startswith("checkpoint-")}


def killed_after(stage: str, ready: Path, out: Path, count: int, delay: float = 0.0) -> Path:
    """Start a stage and kill it a little after it has saved `count` times more; returns the newest checkpoint that it left."""
    before = saved(stage, out)
    process = start(stage, ready, out)
    seen: set[Path] = set()
    while len(seen) < count and process.is_alive():
        seen |= saved(stage, out) - before
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert not (out / stage).exists(), "the stage was not killed but ended"
    return max(saved(stage, out), key=checkpoints.number)


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
    """It goes on each time from the newest checkpoint, and so does again what came after that alone."""
    for kill in range(2):
        newest = killed_after(stage, ready, out, rng.randint(1, 3), delay=0.1 * rng.random())
        assert ("going on from" in printed(out)) is (kill > 0)
    assert finished(start(stage, ready, out)) == 0, printed(out)
    assert f"going on from {newest.name}" in printed(out)
    assert outs(stage, out) == outs(stage, ready)
    assert not saved(stage, out), "checkpoints are removed on success"


def test_a_damaged_checkpoint_is_passed_over(ready, tmp_path):
    before = killed_after("sft", ready, tmp_path, 2)
    damaged, half = (before.with_name(f"checkpoint-{checkpoints.number(before) + more}") for more in (1, 2))
    shutil.copytree(before, damaged)
    weights = damaged / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"half")
    assert finished(start("sft", ready, tmp_path)) == 0, printed(tmp_path)
    for folder in (half, damaged):
        assert f"{folder.name} is incomplete or damaged: passed over" in printed(tmp_path)
    assert f"going on from {before.name}" in printed(tmp_path)
    assert outs("sft", tmp_path) == outs("sft", ready)


@pytest.mark.parametrize("request_to_end", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_saves_first(request_to_end, ready, tmp_path):
    process = start("sft", ready, tmp_path, NEVER)
    while process.is_alive() and not ((tmp_path / "printed").exists() and "'loss'" in printed(tmp_path)):
        time.sleep(0.01)
    os.kill(process.pid, request_to_end)
    assert finished(process) == 1
    assert "ended on request at step" in printed(tmp_path) and "`dvc repro` goes on from there" in printed(tmp_path)
    assert len(saved("sft", tmp_path)) == 1
    assert finished(start("sft", ready, tmp_path, NEVER)) == 0
    assert "going on from checkpoint-" in printed(tmp_path)
    assert outs("sft", tmp_path) == outs("sft", ready)


def test_the_reference_saves_when_it_is_asked_to_end(ready, tmp_path):
    process = start("reference", ready, tmp_path)
    while process.is_alive() and not saved("reference", tmp_path):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    assert finished(process) == 1
    assert "ended on request after" in printed(tmp_path) and "`dvc repro` goes on from there" in printed(tmp_path)
    assert finished(start("reference", ready, tmp_path, NEVER)) == 0
    assert "going on from checkpoint-" in printed(tmp_path)
    assert outs("reference", tmp_path) == outs("reference", ready)


def test_other_params_take_up_no_checkpoint(ready, tmp_path):
    killed_after("sft", ready, tmp_path, 2)
    text = (ready / "params.yaml").read_text()
    assert "learning_rate: 0.0002" in text
    (tmp_path / "params.yaml").write_text(text.replace("learning_rate: 0.0002", "learning_rate: 0.0003"))
    assert finished(start("sft", ready, tmp_path, NEVER)) == 0
    assert "going on from" not in printed(tmp_path)
    assert outs("sft", tmp_path) != outs("sft", ready)


def test_what_the_result_depends_on_names_the_run(tmp_path, monkeypatch):
    code, inputs = tmp_path / "code.py", [tmp_path / "base", tmp_path / "template"]
    (tmp_path / "base").mkdir()
    files = [code, tmp_path / "base" / "model", tmp_path / "template"]
    for file in files:
        file.write_bytes(b"a")
    monkeypatch.setattr(checkpoints, "loaded_code", lambda: [code])
    names = {checkpoints.fingerprint({"seed": 1}, inputs), checkpoints.fingerprint({"seed": 2}, inputs)}
    for file in files:
        file.write_bytes(b"b")
        names.add(checkpoints.fingerprint({"seed": 1}, inputs))
        file.write_bytes(b"a")
    monkeypatch.setenv("REPROTUNE_LAUNCHED", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    names.add(checkpoints.fingerprint({"seed": 1}, inputs))
    assert len(names) == 3 + len(files)


def test_the_stage_itself_is_loaded_code():
    """Run as a module, it has another name among those that are loaded."""
    code = (
        "import runpy, stages\nfrom stages import checkpoints\n"
        "stages.command = lambda main: print(*(file.name for file in checkpoints.loaded_code()))\n"
        "runpy.run_module('stages.reference', run_name='__main__', alter_sys=True)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True).stdout.split()
    assert {"__init__.py", "checkpoints.py", "reference.py", "training.py"} <= set(found) and "evaluate.py" not in found


def test_runs_that_were_given_up_are_kept_for_a_while(tmp_path):
    """Those of two params files that one goes back and forth between, but not of every value that was once tried."""
    for seed in range(5):
        with pytest.raises(KeyboardInterrupt), checkpoints.kept(tmp_path, {"seed": seed}, []) as run:
            checkpoints.save(run, 1, lambda folder: (folder / "file").write_text("a"))
            raise KeyboardInterrupt
    with checkpoints.kept(tmp_path, {"seed": 3}, []) as run:
        assert checkpoints.latest(run) == run / "checkpoint-1"
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1 and checkpoints.latest(left[0])
