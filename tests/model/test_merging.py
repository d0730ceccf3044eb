"""The merged model: base plus adapter, loadable by the libraries alone, refused if it predicts otherwise.

Talking to a model of the run in the terminal is tested here as well.
"""

import io
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from reprotune import params_file
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.evaluation import terminal_chat
from reprotune.model import decoding, loading, merging, saving
from reprotune.records import read_metrics, write_json
from tests import steps
from tests.conftest import changed
from tests.tiny import ROOT, alpaca_rows

MERGED_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def trained(settings, model, folder, **values):
    """Settings and the paths of `merge`, with an adapter that changes much."""
    settings = changed(settings, {"sft.learning_rate": 1e-2, "sft.epochs": 8.0, **values})
    steps.tokenize_sft(settings, model, alpaca_rows(), folder)
    steps.sft(settings, model, folder)
    paths = Namespace(
        base=model,
        adapter=folder / "sft",
        data=folder / "sft_tokens",
        templates=steps.TEMPLATES,
        out=folder / "final",
        metrics=folder / "merge.json",
    )
    return settings, paths


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_merged_model_is_the_trained_one(method, settings, model, tokenizer, tmp_path):
    settings, paths = trained(settings, model, tmp_path, **{"lora.method": method})
    merging.run(settings, paths)
    metrics = read_metrics(paths.metrics)
    assert 0 <= metrics["kl"] < 1e-3 and metrics["agreement"] > 0.9 and metrics["n"] > 20
    scored = metrics["scored_kl"], metrics["scored_agreement"]
    assert scored == (metrics["kl"], metrics["agreement"]), "nothing is quantized here"
    assert {file.name for file in paths.out.iterdir()} == MERGED_FILES
    weights = load_file(paths.out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    # loaded by the libraries alone
    merged = AutoModelForCausalLM.from_pretrained(paths.out, dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    ids = torch.tensor([tokenizer.encode("the red cat runs and the blue dog sleeps")])
    with torch.no_grad():
        policy, base, whole = (
            policy(ids).logits.log_softmax(-1)
            for policy in (
                loading.load_policy(model, paths.adapter, settings.model),
                loading.load_base(model, settings.model),
                merged,
            )
        )
    assert (whole - policy).abs().max() < 0.1 < 1 < (base - policy).abs().max(), "the trained part is in it"
    ends = GenerationConfig.from_pretrained(paths.out).eos_token_id
    assert AutoTokenizer.from_pretrained(paths.out).eos_token_id == ends[0] == tokenizer.eos_token_id


def test_weights_are_the_base_s_own_plus_the_adapter_rounded_once(settings, model, tmp_path):
    settings, paths = trained(settings, model, tmp_path, **{"model.quantization": "nf4"})
    merging.run(settings, paths)
    base = load_file(model / "model.safetensors")
    adapter = load_file(paths.adapter / "adapter_model.safetensors")
    merged = load_file(paths.out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"].float() for matrix in "AB")
    expected = base[f"{name}.weight"].float() + settings.lora.alpha / settings.lora.r * b @ a
    # a float32 sum in another order may be rounded to the neighbouring bfloat16
    torch.testing.assert_close(merged[f"{name}.weight"].float(), expected, rtol=2**-7, atol=1e-6)
    metrics = read_metrics(paths.metrics)
    assert 0 < 10 * metrics["kl"] < metrics["scored_kl"], "the scored model has a quantized base"


def test_a_merge_that_predicts_otherwise_is_refused(settings, model, tmp_path):
    settings, paths = trained(settings, model, tmp_path)
    settings = changed(settings, {"merge.max_kl": 1e-12})
    message = (
        r"final: found a KL divergence .* expected at most 1e-12 and at least 0\.5 \(params\.yaml: merge\)"
    )
    with pytest.raises(InputError, match=message):
        merging.run(settings, paths)


class Known(torch.nn.Module):
    """Predicts the same distribution everywhere."""

    device = torch.device("cpu")

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, input_ids, logits_to_keep, use_cache):
        return Namespace(logits=self.logits.expand(1, len(logits_to_keep), -1))


def test_known_differences():
    """Between models whose predictions are known, over the labelled tokens alone."""
    labels = [-100, 1, -100, -100, -100, 2]
    rows = [{"input_ids": [0, 1, 2, 3, 1, 2], "labels": labels, "seq_lengths": [3, 3]}]
    first, second = Known([0.5, 0.25, 0.25]), Known([0.25, 0.5, 0.25])
    kl = pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item())
    assert merging.compare(first, second, rows) == {"kl": kl, "agreement": 0.0, "n": 2}
    assert merging.compare(first, first, rows) == {"kl": 0.0, "agreement": 1.0, "n": 2}


def test_a_model_can_be_talked_to(settings, model, tokenizer, monkeypatch, capsys):
    """It answers what the libraries give for the whole conversation, and /new forgets that."""
    policy = loading.load_base(model, settings.model)
    policy.generation_config = decoding.of_run(model, tokenizer)
    lines = "the red cat\nand the dog\n/new\nthe red cat\n\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    asked = []
    real_answer = terminal_chat.answer

    def answer(model, tokenizer, conversation, *others):
        before, text = list(conversation), real_answer(model, tokenizer, conversation, *others)
        asked.append((before, text))
        return text

    monkeypatch.setattr(terminal_chat, "answer", answer)
    terminal_chat.talk(policy, tokenizer, 8, 0.0)
    turns = [[turn["content"] for turn in conversation] for conversation, _ in asked]
    first, _, third = (text for _, text in asked)
    assert turns == [["the red cat"], ["the red cat", first, "and the dog"], ["the red cat"]]
    assert first == third
    for conversation, text in asked:
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        generated = AutoModelForCausalLM.from_pretrained(model).generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = generated[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(new_tokens, skip_special_tokens=True) == text
    assert "".join(first.split()) in "".join(capsys.readouterr().out.split())


def test_base_and_full_model_answer_by_the_base_s_settings(
    world, settings, model, tmp_path, monkeypatch, capsys
):
    """The same weights, so the same answer, which a penalty of the base's changes."""
    answers, full = [], changed(settings, {"lora.method": "full"})
    monkeypatch.setattr(params_file, "load", lambda: full)
    for own in ({}, {"repetition_penalty": 5.0}):
        models = tmp_path / f"models{len(answers)}"
        shutil.copytree(model, models / "base")
        weights = {key: 3 * weight for key, weight in load_file(model / "model.safetensors").items()}
        save_file(weights, models / "base" / "model.safetensors", {"format": "pt"})
        write_json(models / "base" / "generation_config.json", {"eos_token_id": 0, **own})
        policy = loading.new_policy(models / "base", full.model, full.lora, 1)
        tokenizer = load_tokenizer(models / "base", steps.TEMPLATES / "chatml.jinja")
        saving.save_policy(policy, tokenizer, models / "base", "float32", models / "sft")
        for name in ("base", "sft"):
            monkeypatch.setattr(sys, "stdin", io.StringIO("the red cat\n\n"))
            capsys.readouterr()
            terminal_chat.run(name, models, 12, 0.0, steps.TEMPLATES)
            answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2] == answers[3]


def test_a_conversation_longer_than_the_context_is_refused(settings, model, tokenizer):
    policy = loading.load_base(model, settings.model)
    long = [{"role": "user", "content": "the red cat " * 600}]
    message = (
        r"the conversation takes [\d,]+ tokens, and the model's context holds 1,024; "
        "/new starts a new one"
    )
    with pytest.raises(InputError, match=message):
        terminal_chat.answer(policy, tokenizer, long, 8, 0.0)


def test_a_model_that_is_not_there_is_named(world):
    result = subprocess.run(
        [sys.executable, "-m", "reprotune", "chat", "final", "--models", str(world / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "none/final: no such folder; `dvc repro merge` makes it, `dvc pull" in result.stderr
