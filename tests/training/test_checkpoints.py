"""A stage that is killed anywhere resumes from its checkpoint, and ends with an undisturbed run's bytes."""

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

from reprotune import fingerprints, params_file
from reprotune.process import command
from reprotune.training import checkpoints
from stages import dpo, reference, sft
from tests import steps, tiny
from tests.conftest import changed

MAIN = {"sft": sft.main, "reference": reference.main, "dpo": dpo.main}
INPUTS = {
    "sft": "--data {0}/sft_tokens",
    "reference": "--data {0}/dpo_tokens --adapter {0}/sft",
    "dpo": "--data {0}/dpo_tokens --adapter {0}/sft --reference {0}/reference",
}
RECORDS = {
    "sft": "--metrics {0}/sft.json --plots {0} --measured {0}",
    "reference": "",
    "dpo": "--metrics {0}/dpo.json --plots {0} --measured {0}",
}
# stages are forked from a process with torch and TRL, whose import takes longer than training the tiny model
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__])
NEVER = 600.0


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A folder with params for some steps on NF4 with dropout, every stage's inputs, and undisturbed outs."""
    folder = tmp_path_factory.mktemp("ready")
    tiny.make_world(folder)
    settings = changed(
        params_file.load(folder / "params.yaml"),
        {"lora.dropout": 0.1, "sft.epochs": 5.0, "dpo.steps": 16, "reference.batch_size": 1},
    )
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
    """Start a stage on the inputs in `ready`.

    Args:
        out: gets outs and checkpoints.
        seconds: between checkpoints.
    """
    out.mkdir(exist_ok=True)
    if not (out / "params.yaml").exists():
        shutil.copy(ready / "params.yaml", out / "params.yaml")
    arguments = f"--base {ready}/tiny/model --templates {steps.TEMPLATES} --configs {steps.CONFIGS} "
    arguments += f"--checkpoints {out}/checkpoints/{stage} --out {out}/{stage} "
    arguments += INPUTS[stage].format(ready) + " " + RECORDS[stage].format(out)
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
    files += [
        file
        for name in (f"{stage}.json", f"{stage}.csv", f"{stage}_held_out.csv")
        if (file := folder / name).exists()
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def saved(stage: str, out: Path) -> set[Path]:
    """The checkpoints that a killed run could resume from."""
    # unlike rglob, os.walk allows a folder to be removed meanwhile
    sealed = (
        Path(folder) for folder, _, files in os.walk(out / "checkpoints" / stage) if "manifest.json" in files
    )
    return {folder for folder in sealed if folder.name.startswith("checkpoint-")}


def killed_after(stage: str, ready: Path, out: Path, count: int, delay: float = 0.0) -> Path:
    """Kill a stage `delay` seconds after it has saved `count` times, and return its newest checkpoint."""
    before = saved(stage, out)
    process = start(stage, ready, out)
    seen: set[Path] = set()
    while len(seen) < count and process.is_alive():
        seen |= saved(stage, out) - before
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert not (out / stage).exists(), "the stage ended before it was killed"
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
    """Each time it resumes from the newest checkpoint."""
    for kill in range(2):
        newest = killed_after(stage, ready, out, rng.randint(1, 3), delay=0.1 * rng.random())
        assert ("resuming from" in printed(out)) is (kill > 0)
    assert finished(start(stage, ready, out)) == 0, printed(out)
    assert f"resuming from {newest.name}" in printed(out)
    assert outs(stage, out) == outs(stage, ready)
    assert not saved(stage, out), "checkpoints are removed on success"


def test_a_damaged_checkpoint_is_skipped(ready, tmp_path):
    before = killed_after("sft", ready, tmp_path, 2)
    newest = checkpoints.number(before)
    damaged, half = (before.with_name(f"checkpoint-{newest + later}") for later in (1, 2))
    shutil.copytree(before, damaged)
    weights = damaged / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"half")
    assert finished(start("sft", ready, tmp_path)) == 0, printed(tmp_path)
    for folder in (half, damaged):
        assert f"{folder.name} is incomplete or damaged: skipped" in printed(tmp_path)
    assert f"resuming from {before.name}" in printed(tmp_path)
    assert outs("sft", tmp_path) == outs("sft", ready)


@pytest.mark.parametrize("request_to_end", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_saves_first(request_to_end, ready, tmp_path):
    process = start("sft", ready, tmp_path, NEVER)
    while process.is_alive() and not ((tmp_path / "printed").exists() and "'loss'" in printed(tmp_path)):
        time.sleep(0.01)
    os.kill(process.pid, request_to_end)
    assert finished(process) == 1
    assert "ended on request at step" in printed(tmp_path)
    assert "`dvc repro` resumes there" in printed(tmp_path)
    assert len(saved("sft", tmp_path)) == 1
    assert finished(start("sft", ready, tmp_path, NEVER)) == 0
    assert "resuming from checkpoint-" in printed(tmp_path)
    assert outs("sft", tmp_path) == outs("sft", ready)


def test_the_reference_saves_when_it_is_asked_to_end(ready, tmp_path):
    process = start("reference", ready, tmp_path)
    while process.is_alive() and not saved("reference", tmp_path):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    assert finished(process) == 1
    assert "ended on request after" in printed(tmp_path)
    assert "`dvc repro` resumes there" in printed(tmp_path)
    assert finished(start("reference", ready, tmp_path, NEVER)) == 0
    assert "resuming from checkpoint-" in printed(tmp_path)
    assert outs("reference", tmp_path) == outs("reference", ready)


def test_other_params_take_up_no_checkpoint(ready, tmp_path):
    killed_after("sft", ready, tmp_path, 2)
    text = (ready / "params.yaml").read_text()
    assert "learning_rate: 0.0002" in text
    (tmp_path / "params.yaml").write_text(text.replace("learning_rate: 0.0002", "learning_rate: 0.0003"))
    assert finished(start("sft", ready, tmp_path, NEVER)) == 0
    assert "resuming from" not in printed(tmp_path)
    assert outs("sft", tmp_path) != outs("sft", ready)


@pytest.fixture
def loaded_module(tmp_path, monkeypatch) -> Path:
    """The file of the only module that counts as loaded code of this project."""
    file = tmp_path / "reprotune" / "fingerprints.py"
    file.parent.mkdir()
    file.write_text("def double(x):\n    return 2 * x\n")
    # code of this project is what lies in the checkout of this module
    monkeypatch.setattr(fingerprints, "__file__", str(file))
    assert list(fingerprints.of_loaded()) == ["reprotune/fingerprints.py"]
    return file


def test_what_the_result_depends_on_names_the_run(loaded_module, tmp_path, monkeypatch):
    inputs = [tmp_path / "base", tmp_path / "template"]
    (tmp_path / "base").mkdir()
    files = [loaded_module, tmp_path / "base" / "model", tmp_path / "template"]
    for file in files:
        file.write_bytes(b"a")
    names = {checkpoints.fingerprint({"seed": 1}, inputs), checkpoints.fingerprint({"seed": 2}, inputs)}
    for file in files:
        file.write_bytes(b"b")
        names.add(checkpoints.fingerprint({"seed": 1}, inputs))
        file.write_bytes(b"a")
    monkeypatch.setenv("REPROTUNE_LAUNCHED", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    names.add(checkpoints.fingerprint({"seed": 1}, inputs))
    assert len(names) == 3 + len(files)


def test_a_changed_comment_keeps_a_checkpoint_and_a_changed_function_does_not(loaded_module, tmp_path):
    def interrupted() -> Path | None:
        """What a run would resume from; it saves a checkpoint and stops unsuccessfully."""
        with pytest.raises(KeyboardInterrupt), checkpoints.kept(tmp_path / "runs", {}, []) as run:
            newest = checkpoints.latest(run)
            checkpoints.save(run, 1 if newest is None else checkpoints.number(newest) + 1, write_file)
            raise KeyboardInterrupt
        return newest

    def write_file(folder: Path) -> None:
        (folder / "file").write_text("a")

    assert interrupted() is None
    loaded_module.write_text('def double(x):\n    """Twice."""\n    # a comment\n    return 2*x\n')
    assert interrupted().name == "checkpoint-1"
    loaded_module.write_text("def double(x):\n    return 3 * x\n")
    assert interrupted() is None


def test_the_stage_itself_is_loaded_code():
    """Run as a module, it has another name among those that are loaded."""
    code = (
        "import runpy\nfrom reprotune import fingerprints\nfrom reprotune.pipeline import guard\n"
        "guard.stage = lambda main: print(*fingerprints.of_loaded())\n"
        "runpy.run_module('stages.reference', run_name='__main__', alter_sys=True)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {
        "stages/__init__.py",
        "stages/reference.py",
        "reprotune/training/checkpoints.py",
        "reprotune/training/reference.py",
    } <= set(loaded)
    assert "stages/evaluate.py" not in loaded


def interrupted(folder: Path, seed: int) -> Path:
    """The folder of a run that ends after its first checkpoint."""
    with pytest.raises(KeyboardInterrupt), checkpoints.kept(folder, {"seed": seed}, []) as run:
        checkpoints.save(run, 1, lambda checkpoint: (checkpoint / "file").write_text("a"))
        raise KeyboardInterrupt
    return run


def test_the_newest_unfinished_runs_are_kept(tmp_path):
    """Enough to go back and forth between two params files, but not every value that was once tried."""
    for seed in range(5):
        interrupted(tmp_path, seed)
    with checkpoints.kept(tmp_path, {"seed": 3}, []) as run:
        assert checkpoints.latest(run) == run / "checkpoint-1"
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1 and checkpoints.latest(left[0])


def test_a_run_resumes_though_others_are_dated_in_the_future(tmp_path):
    """As by a clock that was years ahead."""
    for seed in range(2):
        os.utime(interrupted(tmp_path, seed), (2**32, 2**32))
    interrupted(tmp_path, 2)
    with checkpoints.kept(tmp_path, {"seed": 2}, []) as run:
        assert checkpoints.latest(run) == run / "checkpoint-1"
