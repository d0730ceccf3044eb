"""The launcher: one process here, and accelerate with DeepSpeed where there are more."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages import launch, modeling, params
from stages.records import read_json, read_parquet
from tests import slurm_cluster, steps, tiny
from tests.clones import make_clone
from tests.conftest import changed


def test_one_device_stays_in_this_process(monkeypatch):
    monkeypatch.delenv("REPROTUNE_PROCESSES", raising=False)
    assert launch.processes() == 1
    assert not launch.relaunched("stages.sft", steps.CONFIGS / "zero2.yaml")


def curve(file: Path) -> list[dict[str, float]]:
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file.open())]


def together(folder: Path, world: Path, processes: int, method: str, prefix: tuple[str, ...] = (), environment: Mapping[str, str] = os.environ, nodes: int = 1, only: str = "") -> None:
    """The three stages that compute with the model, each on one process and on several: the same curves, log-probs and bytes' sizes."""
    settings = changed(
        params.load(world / "params.yaml"),
        {
            "lora.method": "full" if method == "full" else "lora", "model.quantization": "nf4" if method == "qlora" else "none",
            "sft.global_batch_size": 4, "sft.micro_batch_size": 1, "sft.epochs": 3.0, "tokenize.sft.max_length": 64,
            "dpo.global_batch_size": 4, "dpo.micro_batch_size": 1, "dpo.steps": 6, "dpo.learning_rate": 1e-3,
        },
    )  # fmt: skip
    base = world / "tiny" / "model"
    steps.all_of_training(settings, base, folder)
    home = folder / "home"
    home.mkdir()
    with (home / "params.yaml").open("w") as file:
        YAML().dump(settings.model_dump(), file)
    several = home / "several"
    own = f"--templates {steps.TEMPLATES} --configs {steps.CONFIGS} --base {base}"
    for stage, inputs in (
        ("sft", f"--data {folder}/sft_tokens"),
        ("reference", f"--data {folder}/dpo_tokens --adapter {folder}/sft"),
        ("dpo", f"--data {folder}/dpo_tokens --adapter {folder}/sft --reference {folder}/reference"),
    ):
        if only not in ("", stage):
            continue
        outs = f"--checkpoints {home}/checkpoints/{stage} --out {several}/{stage}"
        if stage != "reference":
            outs += f" --metrics {several}/{stage}.json --plots {several}"
        own_environment = {**environment, "REPROTUNE_PROCESSES": str(processes // nodes), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
        command = [*prefix, sys.executable, "-m", f"stages.{stage}", *f"{own} {inputs} {outs}".split()]
        result = subprocess.run(command, cwd=home, env=own_environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
        assert result.returncode == 0, result.stdout[-5000:]
        assert f"stages.{stage}: {processes} processes on {nodes} nodes" in result.stdout
        assert ("zero2" if method == "qlora" else "zero3") in result.stdout
        if stage == "reference":
            for part in ("train", "held_out"):
                found, expected = (read_parquet(where / "reference" / f"{part}.parquet").to_pydict() for where in (several, folder))
                assert all(found[key] == pytest.approx(expected[key], abs=1e-3) for key in expected)
            continue
        found, expected = (curve(where / f"{stage}.csv") for where in (several, folder))
        assert len(found) == len(expected) > 5
        for one, other in zip(found, expected, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-3) and one["tokens"] == other["tokens"]
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
        for one, other in zip(*(read_json(where / f"{stage}.json")["measured"] for where in (several, folder)), strict=True):
            assert one["n"] == other["n"] and one["after"] == pytest.approx(other["after"], abs=1e-2), one
        assert {file.name: file.stat().st_size for file in (several / stage).iterdir()} == {file.name: file.stat().st_size for file in (folder / stage).iterdir()}
        modeling.load_policy(base, several / stage, settings.model)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication with g++")


@needs_compiler
def test_two_processes_do_what_one_does(world, tmp_path):
    together(tmp_path, world, 2, "qlora", only="sft")


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize(("processes", "method"), [(2, "qlora"), (4, "qlora"), (2, "lora"), (4, "full")])
def test_more_processes_and_other_methods_do_what_one_does(processes, method, world, tmp_path):
    together(tmp_path, world, processes, method)


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_several_processes_asked_to_end_save_and_go_on(quantization, world, tmp_path):
    """Under ZeRO-2 and ZeRO-3: SIGTERM to the stage, then the next run ends with the bytes of an undisturbed one."""
    settings = changed(
        params.load(world / "params.yaml"),
        {"model.quantization": quantization, "sft.global_batch_size": 4, "sft.micro_batch_size": 1, "sft.epochs": 6.0, "lora.dropout": 0.1},
    )
    base = world / "tiny" / "model"
    steps.tokenize_sft(settings, base, tiny.alpaca_rows(), tmp_path)
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(settings.model_dump(), file)

    def begin(name: str) -> subprocess.Popen:
        out = tmp_path / name
        command = f"-m stages.sft --base {base} --data {tmp_path}/sft_tokens --templates {steps.TEMPLATES} --configs {steps.CONFIGS}"
        command += f" --checkpoints {out}/checkpoints --out {out}/sft --metrics {out}/sft.json --plots {out}"
        environment = os.environ | {"REPROTUNE_PROCESSES": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
        return subprocess.Popen([sys.executable, *command.split()], cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    process = begin("whole")
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    process = begin("ended")
    printed = ""
    while printed.count("'loss'") < 3 and (line := process.stdout.readline()):
        printed += line
    process.terminate()
    printed += process.communicate()[0]
    assert process.returncode != 0 and "ended on request at step" in printed, printed[-3000:]
    process = begin("ended")
    printed = process.communicate()[0]
    assert process.returncode == 0 and "going on from checkpoint-" in printed, printed[-3000:]
    for name in ("sft/adapter_model.safetensors", "sft.csv", "sft.json", "sft_held_out.csv"):
        assert (tmp_path / "ended" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@needs_compiler
@pytest.mark.soak
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"a Slurm cluster: {slurm_cluster.missing()}")
def test_two_slurm_nodes_do_what_one_process_does(world, tmp_path):
    with slurm_cluster.cluster() as environment:
        together(tmp_path, world, 2, "qlora", ("salloc", "--nodes=2", "--ntasks-per-node=1"), environment, nodes=2)


@needs_compiler
@pytest.mark.soak
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"a Slurm cluster: {slurm_cluster.missing()}")
def test_the_slurm_script_runs_the_pipeline(tmp_path):
    """As a user would submit it: DVC on the first node, the training stages on both."""
    folder = make_clone(tmp_path / "clone", benchmarks=("arc_challenge",))
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    # what is installed is newer than the list of it
    os.utime(folder / "requirements.lock", (0, 0))
    with slurm_cluster.cluster() as environment:
        environment = {name: value for name, value in environment.items() if name != "REPROTUNE_PROCESSES"}
        command = ["sbatch", "--wait", "--nodes=2", "configs/slurm.sbatch"]
        result = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200)
    (log,) = folder.glob("slurm-*.log")
    printed = log.read_text()
    assert result.returncode == 0, result.stdout + printed[-5000:]
    assert all(f"stages.{stage}: 2 processes on 2 nodes" in printed for stage in ("sft", "reference", "dpo"))
    assert (folder / "report" / "report.md").is_file()


@pytest.mark.soak
def test_skypilot_takes_the_task(tmp_path):
    """By its own loader, in an environment of its own."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "skypilot==0.14.1"], check=True)
    script = f"""
import json, sky, yaml
task = sky.Task.from_yaml_config(yaml.safe_load(open({str(tiny.ROOT / "configs" / "sky.yaml")!r})), env_overrides=[("CHECKPOINTS", "s3://bucket/checkpoints")])
(resources,) = task.resources
print(json.dumps([resources.accelerators, resources.use_spot, list(task.storage_mounts), task.run]))
"""
    found = subprocess.run([python, "-c", script], cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, text=True, capture_output=True, check=True).stdout
    accelerators, spot, mounts, commands = json.loads(found.splitlines()[-1])
    assert accelerators == {"H100": 4} and spot and mounts == ["/checkpoints"] and "dvc repro" in commands
