"""The launcher: this process alone on one device, and accelerate with DeepSpeed on several."""

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

from reprotune import params, params_file
from reprotune.model import loading
from reprotune.records import read_metrics, read_parquet
from reprotune.training import launching
from tests import slurm_cluster, steps, tiny
from tests.clones import make_clone
from tests.conftest import changed


def test_one_device_stays_in_this_process(monkeypatch):
    monkeypatch.delenv("REPROTUNE_PROCESSES", raising=False)
    assert launching.processes() == 1
    assert not launching.relaunched("stages.sft", steps.CONFIGS / "zero2.yaml")


def curve(file: Path) -> list[dict[str, float]]:
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file.open())]


def several_do_what_one_does(
    folder: Path,
    world: Path,
    processes: int,
    method: str,
    prefix: tuple[str, ...] = (),
    environment: Mapping[str, str] = os.environ,
    nodes: int = 1,
    stages: tuple[str, ...] = ("sft", "reference", "dpo"),
) -> None:
    """Run the stages on one process and on several; curves, log-probs and file sizes must agree.

    Args:
        prefix: of the command, as `salloc` needs one.
    """
    settings = changed(
        params_file.load(world / "params.yaml"),
        {
            "lora.method": "full" if method == "full" else "lora",
            "model.quantization": "nf4" if method == "qlora" else "none",
            "sft.global_batch_size": 4, "sft.micro_batch_size": 1, "sft.epochs": 3.0,
            "dpo.global_batch_size": 4, "dpo.micro_batch_size": 1, "dpo.steps": 6, "dpo.learning_rate": 1e-3,
            "tokenize.sft.max_length": 64,
        },
    )  # fmt: skip
    base = world / "tiny" / "model"
    steps.all_of_training(settings, base, folder)
    several = folder / "home" / "several"
    several.parent.mkdir()
    write_params(settings, several.parent / "params.yaml")
    zero = "zero2" if method == "qlora" else "zero3"
    for stage in stages:
        result = subprocess.run(
            [*prefix, sys.executable, "-m", f"stages.{stage}", *arguments(stage, base, folder, several)],
            cwd=several.parent,
            env={**environment, **variables(processes // nodes)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        assert result.returncode == 0, result.stdout[-5000:]
        assert f"stages.{stage}: {processes} processes on {nodes} nodes" in result.stdout
        assert zero in result.stdout
        if stage == "reference":
            check_reference(several / stage, folder / stage)
        else:
            check_training(stage, several, folder)
            loading.load_policy(base, several / stage, settings.model)


def write_params(settings: params.Params, file: Path) -> None:
    with file.open("w") as opened:
        YAML().dump(settings.model_dump(), opened)


def variables(processes: int) -> dict[str, str]:
    return {
        "REPROTUNE_PROCESSES": str(processes),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tiny.ROOT),
    }


def arguments(stage: str, base: Path, inputs: Path, out: Path) -> list[str]:
    """Command-line arguments of a stage that reads from `inputs` and writes to `out`."""
    given = f"--base {base} --templates {steps.TEMPLATES} --configs {steps.CONFIGS}"
    given += f" --checkpoints {out}/checkpoints/{stage} --out {out}/{stage}"
    given += f" --data {inputs}/{'sft' if stage == 'sft' else 'dpo'}_tokens"
    if stage != "sft":
        given += f" --adapter {inputs}/sft"
    if stage == "dpo":
        given += f" --reference {inputs}/reference"
    if stage != "reference":
        given += f" --metrics {out}/{stage}.json --plots {out} --measured {out}"
    return given.split()


def check_reference(several: Path, one: Path) -> None:
    for part in ("train", "held_out"):
        actual, expected = (read_parquet(folder / f"{part}.parquet").to_pydict() for folder in (several, one))
        assert all(actual[key] == pytest.approx(expected[key], abs=1e-3) for key in expected)


def check_training(stage: str, several: Path, one: Path) -> None:
    actual, expected = (curve(folder / f"{stage}.csv") for folder in (several, one))
    assert len(actual) == len(expected) > 5
    for row, expected_row in zip(actual, expected, strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], abs=1e-3)
        assert row["tokens"] == expected_row["tokens"]
        assert row["grad_norm"] == pytest.approx(expected_row["grad_norm"], rel=1e-2)
    metrics = (read_metrics(folder / f"{stage}.json")["measured"] for folder in (several, one))
    for measure, expected_measure in zip(*metrics, strict=True):
        assert measure["n"] == expected_measure["n"]
        assert measure["after"] == pytest.approx(expected_measure["after"], abs=1e-2), measure
    actual_sizes, expected_sizes = (
        {file.name: file.stat().st_size for file in (folder / stage).iterdir()} for folder in (several, one)
    )
    assert actual_sizes == expected_sizes


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication with g++"
)


@pytest.mark.slow
@needs_compiler
def test_two_processes_do_what_one_does(world, tmp_path):
    several_do_what_one_does(tmp_path, world, 2, "qlora", stages=("sft",))


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize(("processes", "method"), [(2, "qlora"), (4, "qlora"), (2, "lora"), (4, "full")])
def test_more_processes_and_other_methods_do_what_one_does(processes, method, world, tmp_path):
    several_do_what_one_does(tmp_path, world, processes, method)


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_several_processes_asked_to_end_save_and_go_on(quantization, world, tmp_path):
    """Under ZeRO-2 and ZeRO-3, after SIGTERM the next run ends with the bytes of an undisturbed one."""
    settings = changed(
        params_file.load(world / "params.yaml"),
        {
            "model.quantization": quantization,
            "sft.global_batch_size": 4,
            "sft.micro_batch_size": 1,
            "sft.epochs": 6.0,
            "lora.dropout": 0.1,
        },
    )
    base = world / "tiny" / "model"
    steps.tokenize_sft(settings, base, tiny.alpaca_rows(), tmp_path)
    write_params(settings, tmp_path / "params.yaml")

    def begin(name: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "stages.sft", *arguments("sft", base, tmp_path, tmp_path / name)],
            cwd=tmp_path,
            env=os.environ | variables(2),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

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
    assert process.returncode == 0 and "resuming from checkpoint-" in printed, printed[-3000:]
    for name in ("sft/adapter_model.safetensors", "sft.csv", "sft.json", "sft_held_out.csv"):
        assert (tmp_path / "ended" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@needs_compiler
@pytest.mark.soak
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"a Slurm cluster: {slurm_cluster.missing()}")
def test_two_slurm_nodes_do_what_one_process_does(world, tmp_path):
    with slurm_cluster.cluster() as environment:
        salloc = ("salloc", "--nodes=2", "--ntasks-per-node=1")
        several_do_what_one_does(tmp_path, world, 2, "qlora", salloc, environment, nodes=2)


@needs_compiler
@pytest.mark.soak
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"a Slurm cluster: {slurm_cluster.missing()}")
def test_the_slurm_script_runs_the_pipeline(tmp_path):
    """Submitted with sbatch: DVC runs on the first node, the training stages on both."""
    folder = make_clone(tmp_path / "clone", benchmarks=("arc_challenge",))
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    # older than what is installed, so that nothing is installed anew
    os.utime(folder / "requirements.lock", (0, 0))
    with slurm_cluster.cluster() as environment:
        environment = {name: value for name, value in environment.items() if name != "REPROTUNE_PROCESSES"}
        command = ["sbatch", "--wait", "--nodes=2", "configs/slurm.sbatch"]
        result = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=1200,
        )
    (log,) = folder.glob("slurm-*.log")
    printed = log.read_text()
    assert result.returncode == 0, result.stdout + printed[-5000:]
    assert all(f"stages.{stage}: 2 processes on 2 nodes" in printed for stage in ("sft", "reference", "dpo"))
    assert (folder / "report" / "report.md").is_file()


@pytest.mark.soak
def test_skypilot_takes_the_task(tmp_path):
    """SkyPilot's own loader reads it, installed in its own environment."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "skypilot==0.14.1"], check=True)
    script = f"""
import json, sky, yaml
config = yaml.safe_load(open({str(tiny.ROOT / "configs" / "sky.yaml")!r}))
task = sky.Task.from_yaml_config(config, env_overrides=[("CHECKPOINTS", "s3://bucket/checkpoints")])
(resources,) = task.resources
print(json.dumps([resources.accelerators, resources.use_spot, list(task.storage_mounts), task.run]))
"""
    printed = subprocess.run(
        [python, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path)},
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    accelerators, spot, mounts, commands = json.loads(printed.splitlines()[-1])
    assert accelerators == {"H100": 4} and spot and mounts == ["/checkpoints"] and "dvc repro" in commands
