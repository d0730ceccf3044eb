"""Preflight: what it counts without weights is what real weights, steps and rows give."""

import dataclasses
import re
import subprocess
import sys
import time

import pytest
from transformers import AutoConfig

from stages import InputError, estimates, modeling, params, preflight, tracing
from stages.tracing import Shape
from tests import steps, tiny
from tests.conftest import changed
from tests.tiny import ROOT

SHAPES = {"sft": Shape(1, 48, 48, masked=False), "dpo": Shape(2, 40, 50, masked=True)}


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_weights_are_those_of_the_real_policy(method, settings, model):
    settings = changed(settings, {"lora.method": method})
    real = modeling.new_policy(model, settings.model, settings.lora, 0)
    found = tracing.counts(tracing.policy(AutoConfig.from_pretrained(model), settings.model, settings.lora))
    trained = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    assert (found["trained"], found["frozen"]) == (trained, sum(parameter.numel() for parameter in real.parameters()) - trained)


@pytest.mark.parametrize(
    ("shape", "checkpointing", "method", "dtype"),
    [
        ("sft", False, "lora", "float32"), ("sft", True, "lora", "bfloat16"), ("dpo", False, "lora", "bfloat16"), ("dpo", True, "lora", "float32"),
        ("sft", False, "dora", "bfloat16"), ("dpo", True, "dora", "float32"), ("sft", True, "full", "bfloat16"), ("dpo", False, "full", "float32"),
    ],
)  # fmt: skip
def test_a_traced_step_costs_what_a_real_one_does(shape, checkpointing, method, dtype, settings, model):
    settings = changed(settings, {"lora.method": method, "model.dtype": dtype, "lora.dropout": 0.1})
    config = AutoConfig.from_pretrained(model)
    traced = tracing.traced(config, settings.model, settings.lora, SHAPES[shape], True, checkpointing)
    real = modeling.new_policy(model, settings.model, settings.lora, 0)
    found = tracing.watched(real, dtype, SHAPES[shape], True, checkpointing)
    assert traced.peak == pytest.approx(found.peak, rel=0.02)
    assert (traced.matrices, traced.attention) == (found.matrices, found.attention)
    assert traced.operations == pytest.approx(found.operations, rel=0.05)


def test_a_forward_pass_is_two_flops_a_weight_and_token(settings, model):
    settings = changed(settings, {"lora.r": 1})
    config = AutoConfig.from_pretrained(model)
    whole = tracing.policy(config, settings.model, settings.lora)
    weights = tracing.counts(whole)["linear"] + tracing.counts(whole)["trained"] + config.vocab_size * config.hidden_size
    found = tracing.traced(config, settings.model, settings.lora, SHAPES["sft"], False, False)
    assert found.matrices == 2 * 48 * weights
    assert found.attention == config.num_hidden_layers * 2 * 2 * 48 * 48 * config.num_attention_heads * config.head_dim


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_deep_model_costs_what_its_layers_do(architecture, settings, tmp_path):
    tiny.make_model(tmp_path, architecture=architecture)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers, kinds = 20, ["sliding_attention"] * 5 + ["full_attention"]
    config.layer_types = [kinds[index % 6] if architecture == "gemma3" else "full_attention" for index in range(20)]
    shape = SHAPES["sft"]
    deep, extrapolated = (how(config, settings.model, settings.lora, shape, True, False) for how in (tracing.traced, tracing.cost))
    assert extrapolated.peak == pytest.approx(deep.peak, rel=0.02) and extrapolated.matrices == pytest.approx(deep.matrices, rel=1e-6)
    assert extrapolated.operations == pytest.approx(deep.operations, rel=0.02)


def test_the_full_recipe_fits_its_devices_and_shows_its_derivation():
    begin = time.monotonic()
    command = "-m stages.preflight --params recipes/qwen3-4b.yaml --gpus 4 --gpu h100-80gb --utilization 0.4"
    found = subprocess.run([sys.executable, *command.split()], cwd=ROOT, text=True, capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr
    # 20 seconds on a quiet machine
    assert time.monotonic() - begin < 60
    assert "4,154,588,672 weights, of which 132,120,576 are trained" in found.stdout
    hours = {line.split()[0]: float(line.split()[-2 if "all" not in line else -1]) for line in found.stdout.split("time ")[1].splitlines()[1:6]}
    assert set(hours) == {"sft", "reference", "dpo", "evaluate", "all"}
    assert 1 < hours["all"] < 1.5 and hours["dpo"] > hours["all"] / 2
    assert re.search(r"dpo: 2,000 steps × 128 = [\d,]+ tokens, .* PFLOP ÷ \(4 × 989 TFLOP/s × 0.40\) = ", found.stdout)


def prepared(*arguments: str, recipe: str = "recipes/qwen3-4b.yaml"):
    return preflight.prepared(preflight.parser().parse_args(["--params", recipe, *arguments]))


def test_what_does_not_fit_is_named_with_what_to_change(capsys):
    assert not preflight.show(*prepared("--gpu", "a100-8gb"))
    printed = capsys.readouterr().out
    assert printed.count("DOES NOT FIT") == 2
    assert re.search(r"^dpo does not fit: .*; lower tokenize.dpo.max_length, found 2048, or take devices with more memory$", printed, re.MULTILINE)
    assert re.search(r"^sft does not fit: [\d.]+ GiB of 7.9; with sft.micro_batch_size: 1 it takes [\d.]+ GiB$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100"], "expected a name and its memory, such as h100-80gb"),
        (["--gpu", "abacus-80gb"], "known are a10"),
        (["--gpus", "0"], "--gpus: found 0, expected at least 1"),
        (["--utilization", "40"], "--utilization: found 40.0, expected a share"),
        (["--models", "nowhere", "--gpu", "h100-80gb"], "`dvc repro fetch_model` fetches it"),
    ],
)
def test_what_it_cannot_count_is_said(arguments, message):
    with pytest.raises(InputError, match=message):
        prepared(*arguments)


def test_devices_share_what_deepspeed_parts(model):
    """ZeRO-2 parts gradients and optimizer, ZeRO-3 the weights too, of which it gathers those of some layers."""
    settings, _, machine, tokenized = prepared("--gpu", "h100-80gb")
    config, four = AutoConfig.from_pretrained(model), dataclasses.replace(machine, devices=4)
    alone, parted = (estimates.needs(settings, config, one, tokenized)[0][0] for one in (machine, four))
    trained = tracing.counts(tracing.policy(config, settings.model, settings.lora))["trained"]
    assert parted.weights == alone.weights and alone.trained == 16 * trained and parted.trained == (4 + 12 / 4 + 4) * trained
    whole = changed(settings, {"lora.method": "full", "model.quantization": "none"})
    alone, parted = (estimates.needs(whole, config, one, tokenized)[0][0] for one in (machine, four))
    assert parted.weights == alone.weights * 1.25 and parted.trained == alone.trained / 4


def test_rows_that_are_there_are_counted(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, tiny.alpaca_rows(), tmp_path)
    steps.tokenize_dpo(settings, model, tiny.preference_rows(), tmp_path)
    rows = steps.training_rows(tmp_path)
    sft = estimates.sft_work(settings, tmp_path / "sft_tokens", 1)
    assert sft.tokens == pytest.approx(sft.steps * settings.sft.global_batch_size * sum(map(len, rows["input_ids"])) / len(rows))
    assert sft.largest.length == max(map(len, rows["input_ids"]))
    dpo = estimates.dpo_work(settings, tmp_path / "dpo_tokens", 1, shared=True)
    pairs = settings.dpo.steps * settings.dpo.global_batch_size
    assert dpo.steps == settings.dpo.steps and dpo.largest.rows == settings.dpo.micro_batch_size
    assert pairs * dpo.largest.length >= dpo.tokens > pairs * dpo.largest.length / 2


def test_an_unknown_data_set_is_asked_for(settings):
    with pytest.raises(InputError, match="is not tokenized yet and its size is not known; `dvc repro tokenize_sft tokenize_dpo`"):
        estimates.sft_work(settings, None, 1)


def test_published_sizes_stand_for_the_recipe():
    recipe = params.load(ROOT / "recipes" / "qwen3-4b.yaml")
    work = estimates.sft_work(recipe, None, 4)
    assert work.steps == 1207 and work.largest == Shape(1, 4 * 2048, 4 * 2048, masked=False)
