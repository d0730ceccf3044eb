"""The launcher: one process here, and accelerate with DeepSpeed where there are more."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from stages import launch
from tests import steps, tiny


def test_one_device_stays_in_this_process(monkeypatch):
    monkeypatch.delenv("REPROTUNE_PROCESSES", raising=False)
    assert launch.processes() == 1
    assert not launch.relaunched("stages.sft", steps.LAUNCH)


@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its CPU communication with g++")
def test_two_processes_train_under_deepspeed(world, tmp_path):
    """SFT on two CPU processes: DeepSpeed ZeRO-2 really runs, and leaves one adapter that learned what one process learns."""
    from stages import params

    settings = params.load(world / "params.yaml")
    base = world / "tiny" / "model"
    steps.tokenize_sft(settings, base, tiny.alpaca_rows(), tmp_path)
    alone = steps.sft(settings, base, tmp_path)
    command = f"-m stages.sft --base {base} --data {tmp_path}/sft_tokens --templates {steps.TEMPLATES} --launch-config {steps.LAUNCH} --checkpoints {tmp_path}/checkpoints"
    command += f" --out {tmp_path}/two --metrics {tmp_path}/two.json --curves {tmp_path}/two.csv --speed {tmp_path}/two_speed.csv"
    environment = os.environ | {"REPROTUNE_PROCESSES": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
    result = subprocess.run([sys.executable, *command.split()], cwd=world, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "DeepSpeed" in result.stdout and "stages.sft: 2 processes" in result.stdout
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["steps"] == alone["steps"]
    found, expected = (steps.measured(metrics)["held-out rows", "loss"] for metrics in (two, alone))
    assert abs(found["before"] - expected["before"]) < 1e-3
    assert abs(found["after"] - expected["after"]) < 1e-2
    assert (tmp_path / "two" / "adapter_model.safetensors").stat().st_size == (tmp_path / "sft" / "adapter_model.safetensors").stat().st_size
