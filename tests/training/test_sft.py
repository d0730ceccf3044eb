"""SFT: it learns what the rows say, repeats byte for byte, and measures every step."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from reprotune.data.shards import read_shards
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.model import loading, policies
from reprotune.training import sft
from tests import steps
from tests.conftest import changed
from tests.tiny import ROOT, WORDS, alpaca_rows, preference_rows

RULE = {"red": "cat", "blue": "dog", "green": "bird"}


def rule_rows(count: int) -> list[dict]:
    """Rows whose answer follows from a colour in the prompt; its other words are noise."""
    colors = list(RULE)
    return [
        {
            "instruction": f"{WORDS[n * 5 % 23]} {colors[n % 3]} {WORDS[(n * 11 + n // 23) % 23]} {n}",
            "input": "",
            "output": RULE[colors[n % 3]],
        }
        for n in range(count)
        if not {WORDS[n * 5 % 23], WORDS[(n * 11 + n // 23) % 23]} & set(RULE)
    ]


def answers(model, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers, the end-of-turn token included."""
    decoded = []
    for prompt in prompts:
        ids = torch.tensor(
            [
                tokenizer.encode(
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                    )
                )
            ]
        )
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        decoded.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return decoded


def test_a_rule_is_learned_and_turns_end(settings, model, tmp_path):
    settings = changed(
        settings,
        {
            "tokenize.sft.held_out": 60, "lora.r": 16, "lora.alpha": 32, "lora.dropout": 0.0,
            "sft.learning_rate": 1e-2, "sft.epochs": 14.0,
            "sft.global_batch_size": 4, "sft.warmup_ratio": 0.1,
        },
    )  # fmt: skip
    rows = rule_rows(400)
    steps.tokenize_sft(settings, model, rows[:-60], tmp_path)
    metrics = steps.sft(settings, model, tmp_path)
    loss = steps.measured(metrics)["held-out rows", "loss"]
    assert loss["after"] == metrics["held_out_loss"] < loss["before"] - 1
    tuned = loading.load_policy(model, tmp_path / "sft", settings.model)
    unseen = rows[-60:]
    tokenizer = load_tokenizer(model, ROOT / "templates" / "chatml.jinja")
    given = answers(tuned, tokenizer, [row["instruction"] for row in unseen])
    right = sum(answer == row["output"] + "<|im_end|>" for answer, row in zip(given, unseen, strict=True))
    assert right / len(unseen) >= 0.95, given
    check_without_reprotune(tmp_path / "sft", unseen[:8])


def check_without_reprotune(adapter: Path, rows: list[dict]) -> None:
    """The libraries alone take template and stop token from the adapter's folder."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(
        adapter, generation_config=GenerationConfig.from_pretrained(adapter)
    )
    for row in rows:
        chat = [{"role": "user", "content": row["instruction"]}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, max_new_tokens=50, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert len(out) < 10 and out[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(out, skip_special_tokens=True) in RULE.values()


def test_twice_gives_the_same_bytes_and_no_pickle(settings, model, tmp_path):
    settings = changed(settings, {"model.quantization": "nf4"})
    for name in ("one", "another_longer_name"):
        steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path / name)
        steps.sft(settings, model, tmp_path / name)
    first, second = (tmp_path / name / "sft" for name in ("one", "another_longer_name"))
    assert sorted(file.name for file in first.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json", "chat_template.jinja",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    for file in ("sft.json", "sft.csv"):
        assert (first.parent / file).read_bytes() == (second.parent / file).read_bytes()
    config = json.loads((first / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    written = json.loads((first / "generation_config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"]) == ([2, 0], 0)


def test_the_adapter_stays_in_float32_on_a_quantized_base(settings, model, tmp_path):
    settings = changed(settings, {"model.quantization": "nf4"})
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    steps.sft(settings, model, tmp_path)
    weights = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    values = torch.cat([weight.flatten() for weight in weights.values()])
    assert (values != values.bfloat16().float()).any(), "the weights were rounded to bfloat16"


def test_the_curve_has_a_row_a_step(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    metrics = steps.sft(settings, model, tmp_path)
    header, *lines = (tmp_path / "sft.csv").read_text().splitlines()
    assert header == "step,loss,learning_rate,grad_norm,tokens"
    assert len(lines) == metrics["steps"]
    speed = (tmp_path / "sft_speed.csv").read_text().splitlines()
    assert speed[0] == "step,seconds,tokens_per_second,memory_mib,mfu"
    held_out = [line.split(",") for line in (tmp_path / "sft_held_out.csv").read_text().splitlines()]
    loss = steps.measured(metrics)["held-out rows", "loss"]
    middle = round(metrics["steps"] / 2)
    assert [row[0] for row in held_out] == ["step", "0", str(middle), str(metrics["steps"])]
    losses = [float(row[1]) for row in held_out[1:]]
    assert [losses[0], losses[2]] == [loss["before"], loss["after"]]
    assert losses[0] > losses[1] > losses[2]


def test_training_stops_where_its_loss_is_no_number(settings, model, tmp_path):
    huge = settings.sft.model_copy(update={"learning_rate": 1e38, "warmup_ratio": 0.0})
    settings = settings.model_copy(update={"sft": huge})
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    with pytest.raises(
        InputError,
        match=r"step \d+: (loss|grad_norm) is (nan|inf), expected a finite number; lower learning_rate",
    ):
        steps.sft(settings, model, tmp_path)
    assert not (tmp_path / "sft").exists()


def curve(folder: Path) -> list[dict[str, float]]:
    header, *lines = (folder / "sft.csv").read_text().splitlines()
    return [dict(zip(header.split(","), map(float, line.split(",")), strict=True)) for line in lines]


def test_a_global_batch_has_the_same_gradients_however_it_is_split(settings, model, tmp_path):
    """Rows hold 1 to 3 examples, so that micro-batches differ in their labelled tokens."""
    settings = changed(
        settings,
        {"tokenize.sft.max_length": 64, "sft.global_batch_size": 8, "sft.epochs": 3.0, "lora.dropout": 0.0},
    )
    rows = [row | {"output": row["output"] * (1 + number % 3)} for number, row in enumerate(alpaca_rows())]
    steps.tokenize_sft(settings, model, rows, tmp_path)
    curves = []
    for size in (1, 2, 8):
        steps.sft(changed(settings, {"sft.micro_batch_size": size}), model, tmp_path)
        curves.append(curve(tmp_path))
    *split, whole = curves
    assert len(whole) > 5
    for rows in split:
        for row, whole_row in zip(rows, whole, strict=True):
            for key in ("tokens", "learning_rate"):
                assert row[key] == whole_row[key]
            for key in ("loss", "grad_norm"):
                assert row[key] == pytest.approx(whole_row[key], rel=1e-4)


@pytest.mark.parametrize("method", ["dora", "full"])
def test_other_methods_learn_and_are_loaded(method, settings, model, tmp_path):
    settings = changed(
        settings,
        {
            "lora.method": method,
            "model.quantization": "nf4" if method == "dora" else "none",
            "sft.epochs": 4.0,
            "sft.learning_rate": 5e-3,
        },
    )
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    loss = steps.measured(steps.sft(settings, model, tmp_path))["held-out rows", "loss"]
    assert loss["after"] < loss["before"] - 0.1
    policy = loading.load_policy(model, tmp_path / "sft", settings.model)
    add_fused_lm_head(policies.bare(policy))
    rows = read_shards(tmp_path / "sft_tokens", "held_out")
    assert sft.loss_per_token(policy, rows, 0, 2, "again") == pytest.approx(loss["after"], rel=1e-5)
    steps.tokenize_dpo(settings, model, preference_rows(), tmp_path)
    steps.reference(settings, model, tmp_path)
    margin = steps.measured(steps.dpo(settings, model, tmp_path))["training pairs", "reward margin"]
    assert margin["before"] == 0 and margin["after"] != 0
    loading.load_policy(model, tmp_path / "dpo", settings.model)


def test_noise_on_the_embeddings_changes_the_run_and_repeats(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    adapters = []
    for alpha in (None, 5.0, 5.0):
        steps.sft(changed(settings, {"sft.neftune_noise_alpha": alpha}), model, tmp_path)
        adapters.append((tmp_path / "sft" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1] == adapters[2]


def test_liger_needs_a_gpu(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    with pytest.raises(
        InputError, match="use_liger_kernel: found true, expected false on a machine without a GPU"
    ):
        steps.sft(changed(settings, {"sft.use_liger_kernel": True}), model, tmp_path)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.5]),
        ("inverse_sqrt", [0.0, 0.5, 1.0, 0.8165]),
    ],
)
def test_schedules_warm_up(schedule, expected, settings, model, tmp_path):
    settings = changed(
        settings,
        {
            "sft.lr_scheduler": schedule,
            "sft.warmup_ratio": 0.5,
            "sft.learning_rate": 1e-3,
            "tokenize.sft.max_length": 64,
        },
    )
    steps.tokenize_sft(settings, model, alpaca_rows(14), tmp_path)
    settings = changed(settings, {"sft.epochs": 8 / len(steps.training_rows(tmp_path))})
    steps.sft(settings, model, tmp_path)
    assert [row["learning_rate"] / 1e-3 for row in curve(tmp_path)] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "quantization"), [("lora", "nf4"), ("lora", "none"), ("dora", "none"), ("full", "none")]
)
def test_bfloat16_computes_all_the_way(method, quantization, settings, model, tmp_path):
    """In all three stages: trained weights stay in float32, and DPO starts at its reference."""
    settings = changed(
        settings,
        {
            "model.dtype": "bfloat16",
            "lora.method": method,
            "model.quantization": quantization,
            "sft.gradient_checkpointing": True,
        },
    )
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    loss = steps.measured(steps.sft(settings, model, tmp_path))["held-out rows", "loss"]
    assert loss["after"] < loss["before"]
    steps.tokenize_dpo(settings, model, preference_rows(), tmp_path)
    steps.reference(settings, model, tmp_path)
    steps.dpo(settings, model, tmp_path)
    if method == "full":
        weights = load_file(tmp_path / "dpo" / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        return
    weights = load_file(tmp_path / "dpo" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any((weight != weight.bfloat16().float()).any() for weight in weights.values()), (
        "the adapter was rounded to bfloat16"
    )
