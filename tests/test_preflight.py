"""Preflight: what it counts without weights is what real weights, steps and rows give."""

import dataclasses
import re
import subprocess
import sys
import time

import pytest
from transformers import AutoConfig

from stages import InputError, estimates, modeling, params, preflight, tracing
from stages.attention import BY_SEGMENT, Segment
from stages.tracing import Shape
from tests import steps, tiny
from tests.conftest import changed
from tests.tiny import ROOT

SHAPES = {"sft": Shape(1, 48, 48), "dpo": Shape(2, 40, 50, (Segment(25, 0), Segment(15, 10)))}


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
        ("sft", False, "dora", "bfloat16"), ("dpo", True, "dora", "float32"), ("sft", True, "full", "bfloat16"), ("dpo", False, "full", "float32"), ("sft", False, "eager", "float32"),
    ],
)  # fmt: skip
def test_a_traced_step_costs_what_a_real_one_does(shape, checkpointing, method, dtype, settings, model):
    attention, method = ("eager", "lora") if method == "eager" else ("sdpa", method)
    settings = changed(settings, {"lora.method": method, "model.dtype": dtype, "lora.dropout": 0.1, "model.attention": attention})
    config = AutoConfig.from_pretrained(model)
    traced = tracing.traced(config, settings.model, settings.lora, SHAPES[shape], True, checkpointing)
    real = modeling.new_policy(model, settings.model, settings.lora, 0)
    if attention == "sdpa":
        modeling.bare(real).set_attn_implementation(BY_SEGMENT)
    found = tracing.watched(real, dtype, SHAPES[shape], True, checkpointing)
    assert traced.peak == pytest.approx(found.peak, rel=0.02)
    assert (traced.matrices, traced.attention) == (found.matrices, found.attention) and traced.attention > 0
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
    assert printed.count("DOES NOT FIT") == 4
    for stage, advice in {
        "sft": r"with sft.micro_batch_size: 1 it takes [\d.]+ GiB",
        "reference": r"with reference.batch_size: 1 it takes [\d.]+ GiB",
        "dpo": "reference.batch_size: 1 and dpo.micro_batch_size: 1 is not enough; lower tokenize.dpo.max_length, or take devices with more memory",
        "evaluate": r"with evaluate.batch_texts: 1[\w :.]* it takes [\d.]+ GiB",
    }.items():
        assert re.search(rf"^{stage} does not fit: [\d.]+ GiB of 7.9; {advice}$", printed, re.MULTILINE), stage


def test_a_device_of_unknown_speed_gets_no_hours(capsys):
    settings, config, machine, tokenized = prepared("--gpu", "abacus-80gb")
    assert "abacus-80gb: its speed in bfloat16 is not known, and so no hours are; known are a10, a100" in capsys.readouterr().out
    assert preflight.show(settings, config, machine, tokenized)
    assert "nan" in capsys.readouterr().out


def test_rows_of_other_params_are_not_taken(settings, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "train-00000.arrow").touch()
    recorded = {"seed": settings.seed, "model.chat_template": "chatml", "data.sft": settings.data.sft.model_dump(), "tokenize.sft": settings.tokenize.sft.model_dump()}
    stages = {"fetch_model": {"params": {"params.yaml": {"model.source": settings.model.source.model_dump()}}}, "tokenize_sft": {"params": {"params.yaml": recorded}}}
    assert preflight.tokenized_by(settings, tmp_path, {"stages": stages}) == {"sft": tmp_path / "sft", "dpo": None}
    for key, value in {"seed": 7, "model.chat_template": "alpaca", "tokenize.sft.max_length": 64}.items():
        assert preflight.tokenized_by(changed(settings, {key: value}), tmp_path, {"stages": stages}) == {"sft": None, "dpo": None}
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\na: [")
    with pytest.raises(InputError, match=r"not YAML .*; `git checkout"):
        preflight.read_lock(tmp_path / "dvc.lock")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h100"], "expected a name and its memory, such as h100-80gb"),
        (["--gpus", "3", "--gpu", "h100-80gb"], "sft.global_batch_size: found 128, expected a multiple of micro_batch_size × devices = 16 × 3"),
        (["--gpus", "0"], "--gpus: found 0, expected at least 1"),
        (["--utilization", "40"], "--utilization: found 40.0, expected a share"),
        (["--models", "nowhere", "--gpu", "h100-80gb"], "`dvc repro fetch_model`, with these params as params.yaml, fetches it"),
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
    assert parted.weights == alone.weights and alone.trained == 16 * trained and parted.trained == (4 + 16 / 4) * trained + 4 * estimates.REDUCE_BUCKET
    whole = changed(settings, {"lora.method": "full", "model.quantization": "none"})
    alone, parted = (estimates.needs(whole, config, one, tokenized)[0][0] for one in (machine, four))
    assert parted.weights == alone.weights * 1.25 and parted.trained == alone.trained / 4 + 4 * estimates.REDUCE_BUCKET
    # each device has all of them before they are dealt out
    assert parted.loading == alone.weights


def test_rows_that_are_there_are_counted(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, tiny.alpaca_rows(), tmp_path)
    steps.tokenize_dpo(settings, model, tiny.preference_rows(), tmp_path)
    rows = steps.training_rows(tmp_path)
    sft = estimates.sft_work(settings, tmp_path / "sft_tokens", 1, by_segment=True)
    assert sft.tokens == pytest.approx(sft.steps * settings.sft.global_batch_size * sum(map(len, rows["input_ids"])) / len(rows))
    assert 0 <= max(map(len, rows["input_ids"])) - sft.largest.length < sft.largest.texts <= estimates.TRACED_TEXTS
    dpo = estimates.dpo_work(settings, tmp_path / "dpo_tokens", 1, shared=True)
    pairs = settings.dpo.steps * settings.dpo.global_batch_size
    assert dpo.steps == settings.dpo.steps and (dpo.largest.rows, dpo.largest.texts) == (1, settings.dpo.micro_batch_size)
    longest = dpo.largest.length / dpo.largest.texts
    assert pairs * longest >= dpo.tokens > pairs * longest / 2


def test_an_unknown_data_set_is_asked_for(settings):
    with pytest.raises(InputError, match="is not tokenized with these params yet, and its size is not known; `dvc repro tokenize_sft tokenize_dpo`"):
        estimates.sft_work(settings, None, 1, by_segment=True)


def test_published_sizes_stand_for_the_recipe():
    recipe = params.load(ROOT / "recipes" / "qwen3-4b.yaml")
    work = estimates.sft_work(recipe, None, 4, by_segment=True)
    assert work.steps == 1207 and work.largest == Shape(1, 16 * 2048, int(0.65 * 16 * 2048), (Segment(16 * 2048 // 8, 0),) * 8, 8)
    with pytest.raises(InputError, match="held_out: found 512, expected fewer than the 100 rows"):
        estimates.sft_work(changed(recipe, {"data.sft.mix": {"alpaca": {"limit": 100, "weight": 1.0}}}), None, 4, by_segment=True)
