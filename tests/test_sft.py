"""SFT: learns what the rows say, packs without leaks, and leaves the same bytes twice."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from stages import InputError, modeling, packing, training
from stages.templating import load_tokenizer
from tests import steps
from tests.conftest import changed
from tests.tiny import ROOT, WORDS, alpaca_rows, preference_rows

RULE = {"red": "cat", "blue": "dog", "green": "bird"}


def rule_rows(count: int) -> list[dict]:
    """The answer follows from the colour alone; the words around it do not matter."""
    colors = list(RULE)
    return [
        {"instruction": f"{WORDS[n * 5 % 23]} {colors[n % 3]} {WORDS[(n * 11 + n // 23) % 23]} {n}", "input": "", "output": RULE[colors[n % 3]]}
        for n in range(count)
        if not {WORDS[n * 5 % 23], WORDS[(n * 11 + n // 23) % 23]} & set(RULE)
    ]


def answers(model, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers, up to the end of the turn."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True))])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        found.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return found


def test_a_rule_is_learned_and_turns_end(settings, model, tmp_path):
    settings = changed(
        settings,
        {
            "tokenize.sft.held_out": 60, "lora.r": 16, "lora.alpha": 32, "lora.dropout": 0.0,
            "sft.learning_rate": 1e-2, "sft.epochs": 14.0, "sft.global_batch_size": 4, "sft.warmup_ratio": 0.1,
        },
    )  # fmt: skip
    rows = rule_rows(400)
    steps.tokenize_sft(settings, model, rows[:-60], tmp_path)
    metrics = steps.sft(settings, model, tmp_path)
    loss = steps.measured(metrics)["held-out rows", "loss"]
    assert loss["after"] == metrics["held_out_loss"] < loss["before"] - 1
    tuned = modeling.load_policy(model, tmp_path / "sft", settings.model)
    unseen = rows[-60:]
    found = answers(tuned, load_tokenizer(model, ROOT / "templates" / "chatml.jinja"), [row["instruction"] for row in unseen])
    right = sum(answer == row["output"] + "<|im_end|>" for answer, row in zip(found, unseen, strict=True))
    assert right / len(unseen) >= 0.95, found
    as_a_user_would(tmp_path / "sft", unseen[:8])


def as_a_user_would(adapter: Path, rows: list[dict]) -> None:
    """Load the adapter's folder with the libraries alone: its template asks, and its generation config stops."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, generation_config=GenerationConfig.from_pretrained(adapter))
    for row in rows:
        chat = [{"role": "user", "content": row["instruction"]}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**inputs, max_new_tokens=50, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert len(out) < 10 and out[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(out, skip_special_tokens=True) in RULE.values()


def test_twice_gives_the_same_bytes_and_no_pickle(settings, model, tmp_path):
    settings = changed(settings, {"model.quantization": "nf4"})
    for name in ("one", "another_longer_name"):
        steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path / name)
        steps.sft(settings, model, tmp_path / name)
    one, two = (tmp_path / name / "sft" for name in ("one", "another_longer_name"))
    assert sorted(file.name for file in one.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name
    for file in ("sft.json", "sft.csv"):
        assert (one.parent / file).read_bytes() == (two.parent / file).read_bytes()
    config = json.loads((one / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert json.loads((one / "generation_config.json").read_text()) == {"eos_token_id": 2, "pad_token_id": 0}


def test_the_adapter_stays_in_float32_on_a_quantized_base(settings, model, tmp_path):
    settings = changed(settings, {"model.quantization": "nf4"})
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    steps.sft(settings, model, tmp_path)
    weights = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    fine = torch.cat([weight.flatten() for weight in weights.values()])
    assert (fine != fine.bfloat16().float()).any(), "the weights were rounded to bfloat16"


def test_the_curve_has_a_row_a_step(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    metrics = steps.sft(settings, model, tmp_path)
    header, *lines = (tmp_path / "sft.csv").read_text().splitlines()
    assert header == "step,loss,learning_rate,grad_norm,tokens"
    assert len(lines) == metrics["steps"]
    assert (tmp_path / "sft_speed.csv").read_text().splitlines()[0] == "step,seconds,tokens_per_second,memory_mib,mfu"
    held_out = [line.split(",") for line in (tmp_path / "sft_held_out.csv").read_text().splitlines()]
    loss = steps.measured(metrics)["held-out rows", "loss"]
    middle = round(metrics["steps"] / 2)
    assert [row[0] for row in held_out] == ["step", "0", str(middle), str(metrics["steps"])]
    assert [float(held_out[row][1]) for row in (1, 3)] == [loss["before"], loss["after"]] and loss["before"] > float(held_out[2][1]) > loss["after"]


def test_a_missing_model_file_is_named(settings, model, tmp_path):
    shutil.copytree(model, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"base: the model could not be loaded .*`dvc checkout .*base` restores it"):
        modeling.load_base(tmp_path / "base", settings.model)
    (tmp_path / "base" / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="the model could not be loaded"):
        modeling.load_base(tmp_path / "base", settings.model)


def edited(folder: Path, out: Path, name: str, edit) -> Path:
    """A copy of a model's or an adapter's folder with other tensors in the file `name`."""
    shutil.copytree(folder, out)
    save_file(edit(load_file(folder / name)), out / name, {"format": "pt"})
    return out


def without_one(tensors: dict) -> dict:
    return dict(sorted(tensors.items())[1:])


def renamed(tensors: dict) -> dict:
    return {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("edit", [without_one, renamed])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_that_do_not_fit_are_refused(quantization, edit, settings, model, tmp_path):
    """Where the libraries would put random ones, or go without."""
    settings = changed(settings, {"model.quantization": quantization})
    base = edited(model, tmp_path / "base", "model.safetensors", edit)
    with pytest.raises(InputError, match=r"base: (missing|unexpected) keys: \[.*expected exactly the weights of its config\.json"):
        modeling.load_base(base, settings.model)
    adapted = modeling.new_policy(model, settings.model, settings.lora, 1)
    modeling.save_policy(adapted, load_tokenizer(model, ROOT / "templates" / "chatml.jinja"), model, "float32", tmp_path / "whole")
    adapter = edited(tmp_path / "whole", tmp_path / "adapter", "adapter_model.safetensors", edit)
    modeling.load_policy(model, tmp_path / "whole", settings.model)
    with pytest.raises(InputError, match=r"adapter: \d+ weights are missing or too many, such as base_model"):
        modeling.load_policy(model, adapter, settings.model)


def test_an_unknown_target_is_named(settings, model):
    settings = changed(settings, {"lora.target_modules": ["q_proj", "qproj"]})
    with pytest.raises(InputError, match=r"lora\.target_modules: found 'qproj', expected the end of a layer's name, such as \['down_proj'"):
        modeling.new_policy(model, settings.model, settings.lora, 1)


def test_training_stops_where_its_loss_is_no_number(settings, model, tmp_path):
    huge = settings.sft.model_copy(update={"learning_rate": 1e38, "warmup_ratio": 0.0})
    settings = settings.model_copy(update={"sft": huge})
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    with pytest.raises(InputError, match=r"step \d+: (loss|grad_norm) is (nan|inf), expected a finite number; lower learning_rate"):
        steps.sft(settings, model, tmp_path)
    assert not (tmp_path / "sft").exists()


def test_an_adapter_is_not_put_on_another_base(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    steps.sft(settings, model, tmp_path)
    other = edited(model, tmp_path / "base", "model.safetensors", lambda tensors: {name: tensor * 1.01 for name, tensor in tensors.items()})
    with pytest.raises(InputError, match=r"sft: it was trained on the base [0-9a-f]{32}, found [0-9a-f]{32} in .*base"):
        modeling.load_policy(other, tmp_path / "sft", settings.model)
    shutil.rmtree(other)
    shutil.copytree(model, other)
    modeling.load_policy(other, tmp_path / "sft", settings.model)


def curve(folder: Path) -> list[dict[str, float]]:
    header, *lines = (folder / "sft.csv").read_text().splitlines()
    return [dict(zip(header.split(","), map(float, line.split(",")), strict=True)) for line in lines]


def test_a_global_batch_has_the_same_gradients_however_it_is_split(settings, model, tmp_path):
    """Rows of 1 to 3 examples, so that micro-batches differ in how many tokens are trained on."""
    settings = changed(settings, {"tokenize.sft.max_length": 64, "sft.global_batch_size": 8, "sft.epochs": 3.0, "lora.dropout": 0.0})
    rows = [row | {"output": row["output"] * (1 + number % 3)} for number, row in enumerate(alpaca_rows())]
    steps.tokenize_sft(settings, model, rows, tmp_path)
    found = []
    for size in (1, 2, 8):
        steps.sft(changed(settings, {"sft.micro_batch_size": size}), model, tmp_path)
        found.append(curve(tmp_path))
    assert len(found[0]) > 5
    for whole in found[:2]:
        for one, other in zip(whole, found[2], strict=True):
            assert one["tokens"] == other["tokens"] and one["learning_rate"] == other["learning_rate"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4) and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_every_pass_is_over_all_rows_in_another_order():
    rows = datasets.Dataset.from_dict({"number": list(range(6)), "ids": [[0] * (1 + n % 4) for n in range(6)]})
    found = training.batches(rows, ["ids"], 7, 3, 1)
    numbers = found["number"][:]
    assert len(numbers) == 21 and numbers == training.batches(rows, ["ids"], 7, 3, 1)["number"][:]
    passes = [numbers[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(one) == list(range(6)) for one in passes) and passes[0] != passes[1] != passes[2]
    for start in range(0, 21, 3):
        lengths = [len(ids) for ids in found["ids"][start : start + 3]]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("method", ["dora", "full"])
def test_other_methods_learn_and_are_loaded(method, settings, model, tmp_path):
    settings = changed(settings, {"lora.method": method, "model.quantization": "nf4" if method == "dora" else "none", "sft.epochs": 4.0, "sft.learning_rate": 5e-3})
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    loss = steps.measured(steps.sft(settings, model, tmp_path))["held-out rows", "loss"]
    assert loss["after"] < loss["before"] - 0.1
    policy = modeling.load_policy(model, tmp_path / "sft", settings.model)

    add_fused_lm_head(modeling.bare(policy))
    rows = training.shards(tmp_path / "sft_tokens", "held_out")
    assert packing.loss_per_token(policy, rows, 0, 2, "again") == pytest.approx(loss["after"], rel=1e-5)
    steps.tokenize_dpo(settings, model, preference_rows(), tmp_path)
    steps.reference(settings, model, tmp_path)
    found = steps.measured(steps.dpo(settings, model, tmp_path))["training pairs", "reward margin"]
    assert found["before"] == 0 and found["after"] != 0
    modeling.load_policy(model, tmp_path / "dpo", settings.model)


def test_noise_on_the_embeddings_changes_the_run_and_repeats(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    found = []
    for alpha in (None, 5.0, 5.0):
        steps.sft(changed(settings, {"sft.neftune_noise_alpha": alpha}), model, tmp_path)
        found.append((tmp_path / "sft" / "adapter_model.safetensors").read_bytes())
    assert found[0] != found[1] == found[2]


def test_liger_needs_a_gpu(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    with pytest.raises(InputError, match="use_liger_kernel: found true, expected false on a machine without a GPU"):
        steps.sft(changed(settings, {"sft.use_liger_kernel": True}), model, tmp_path)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [0.0, 0.5, 1.0, 1.0]), ("linear", [0.0, 0.5, 1.0, 0.5]), ("inverse_sqrt", [0.0, 0.5, 1.0, 0.8165])])
def test_schedules_warm_up(schedule, expected, settings, model, tmp_path):
    settings = changed(settings, {"sft.lr_scheduler": schedule, "sft.warmup_ratio": 0.5, "sft.learning_rate": 1e-3, "tokenize.sft.max_length": 64})
    steps.tokenize_sft(settings, model, alpaca_rows(14), tmp_path)
    settings = changed(settings, {"sft.epochs": 8 / len(steps.training_rows(tmp_path))})
    steps.sft(settings, model, tmp_path)
    assert [row["learning_rate"] / 1e-3 for row in curve(tmp_path)] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("method", "quantization"), [("lora", "nf4"), ("lora", "none"), ("dora", "none"), ("full", "none")])
def test_bfloat16_computes_all_the_way(method, quantization, settings, model, tmp_path):
    """Through the three stages: weights that are trained stay in float32, and DPO starts at its reference."""
    settings = changed(settings, {"model.dtype": "bfloat16", "lora.method": method, "model.quantization": quantization, "sft.gradient_checkpointing": True})
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    loss = steps.measured(steps.sft(settings, model, tmp_path))["held-out rows", "loss"]
    assert loss["after"] < loss["before"]
    steps.tokenize_dpo(settings, model, preference_rows(), tmp_path)
    steps.reference(settings, model, tmp_path)
    steps.dpo(settings, model, tmp_path)
    name, kept = ("model.safetensors", torch.bfloat16) if method == "full" else ("adapter_model.safetensors", torch.float32)
    weights = load_file(tmp_path / "dpo" / name)
    assert {weight.dtype for weight in weights.values()} == {kept}
    if method != "full":
        assert any((weight != weight.bfloat16().float()).any() for weight in weights.values()), "the adapter was rounded to bfloat16"


def test_measuring_first_changes_no_gradient(settings, model):
    """On a base in NF4: some CPUs have a kernel for passes without gradients, after which bitsandbytes computes none."""
    ids = torch.arange(3, 60)[None]
    found = []
    for unpacked in (False, True):
        quantized = changed(settings, {"model.quantization": "nf4"}).model
        policy = modeling.load_base(model, quantized, unpacked)
        with modeling.measuring(policy):
            measured = float(policy(ids, labels=ids).loss)
        policy.train()
        # the gradient reaches it through every quantized layer
        weight = policy.get_input_embeddings().weight.requires_grad_()
        loss = policy(ids, labels=ids).loss
        loss.backward()
        assert loss.item() == pytest.approx(measured, abs=1e-5)
        found.append(weight.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
