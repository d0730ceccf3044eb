"""Preflight: what fits, what does not and what to change, and where its numbers come from."""

import re
import subprocess
import sys
import time

import pytest

from reprotune import dvc_lock
from reprotune.errors import InputError
from reprotune.planning import preflight
from tests.conftest import changed
from tests.planning.recipe import prepared
from tests.tiny import ROOT


def test_the_full_recipe_fits_its_devices_and_shows_its_derivation():
    begin = time.monotonic()
    options = "--params recipes/qwen3-4b.yaml --gpus 4 --gpu h100-80gb --utilization 0.4"
    command = [sys.executable, "-m", "reprotune", "preflight", *options.split()]
    finished = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # 20 seconds on a quiet machine
    assert time.monotonic() - begin < 60
    assert "4,154,588,672 weights, of which 132,120,576 are trained" in finished.stdout
    table = finished.stdout.split("time ")[1].splitlines()[1:6]
    hours = {line.split()[0]: float(line.split()[-2 if "all" not in line else -1]) for line in table}
    assert set(hours) == {"sft", "reference", "dpo", "evaluate", "all"}
    assert 1 < hours["all"] < 1.5 and hours["dpo"] > hours["all"] / 2
    derivation = r"dpo: 2,000 steps × 128 = [\d,]+ tokens, .* PFLOP ÷ \(4 × 989 TFLOP/s × 0.40\) = "
    assert re.search(derivation, finished.stdout)


@pytest.mark.slow
def test_what_does_not_fit_is_named_with_what_to_change(capsys):
    assert not preflight.show(*prepared("--gpu", "a100-8gb"))
    printed = capsys.readouterr().out
    assert printed.count("DOES NOT FIT") == 4
    for stage, advice in {
        "sft": r"with sft.micro_batch_size: 1 it takes [\d.]+ GiB",
        "reference": r"with reference.batch_size: 1 it takes [\d.]+ GiB",
        "dpo": "reference.batch_size: 1 and dpo.micro_batch_size: 1 is not enough; "
        "lower tokenize.dpo.max_length, or take devices with more memory",
        "evaluate": r"with evaluate.batch_texts: 1[\w :.]* it takes [\d.]+ GiB",
    }.items():
        line = rf"^{stage} does not fit: [\d.]+ GiB of 7.9; {advice}$"
        assert re.search(line, printed, re.MULTILINE), stage


@pytest.mark.slow
def test_a_device_of_unknown_speed_gets_no_hours(capsys):
    settings, config, machine, tokenized = prepared("--gpu", "abacus-80gb")
    message = "abacus-80gb: its speed in bfloat16 is not known, and so no hours are; known are a10, a100"
    assert message in capsys.readouterr().out
    assert preflight.show(settings, config, machine, tokenized)
    assert "nan" in capsys.readouterr().out


def test_rows_of_other_params_are_not_taken(settings, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "train-00000.arrow").touch()
    recorded = {
        "seed": settings.seed,
        "model.chat_template": "chatml",
        "data.sft": settings.data.sft.model_dump(),
        "tokenize.sft": settings.tokenize.sft.model_dump(),
    }
    stages = {
        "fetch_model": {"params": {"params.yaml": {"model.source": settings.model.source.model_dump()}}},
        "tokenize_sft": {"params": {"params.yaml": recorded}},
    }
    sft = tmp_path / "sft"
    assert preflight.tokenized_by(settings, tmp_path, stages) == {"sft": sft, "dpo": None}
    for key, value in {"seed": 7, "model.chat_template": "alpaca", "tokenize.sft.max_length": 64}.items():
        others = changed(settings, {key: value})
        assert preflight.tokenized_by(others, tmp_path, stages) == {"sft": None, "dpo": None}
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\na: [")
    with pytest.raises(InputError, match=r"not a lock file of DVC .*; `git checkout"):
        dvc_lock.read_stages(tmp_path / "dvc.lock")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100"], "expected a name and its memory, such as h100-80gb"),
        (
            ["--gpus", "3", "--gpu", "h100-80gb"],
            "sft.global_batch_size: found 128, expected a multiple of micro_batch_size × devices = 16 × 3",
        ),
        (["--gpus", "0"], "--gpus: found 0, expected at least 1"),
        (["--utilization", "40"], "--utilization: found 40.0, expected a share"),
        (
            ["--models", "nowhere", "--gpu", "h100-80gb"],
            "`dvc repro fetch_model`, with these params as params.yaml, fetches it",
        ),
    ],
)
def test_what_it_cannot_count_is_said(arguments, message):
    with pytest.raises(InputError, match=message):
        prepared(*arguments)
