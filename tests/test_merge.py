"""The merged model is base plus adapter, loads as any other, and is refused where it predicts otherwise; and it can be talked to."""

import io
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stages import InputError, chat, merge, modeling
from stages.records import read_json
from tests import steps
from tests.conftest import changed
from tests.tiny import ROOT, alpaca_rows


def trained(settings, model, folder, **values):
    """Settings and the paths of `merge`, with an adapter that changes much."""
    settings = changed(settings, {"sft.learning_rate": 1e-2, "sft.epochs": 8.0, **values})
    steps.tokenize_sft(settings, model, alpaca_rows(), folder)
    steps.sft(settings, model, folder)
    return settings, Namespace(base=model, adapter=folder / "sft", data=folder / "sft_tokens", templates=steps.TEMPLATES, out=folder / "final", metrics=folder / "merge.json")


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_merged_model_is_the_trained_one(method, settings, model, tokenizer, tmp_path):
    settings, paths = trained(settings, model, tmp_path, **{"lora.method": method})
    merge.run(settings, paths)
    metrics = read_json(paths.metrics)
    assert 0 <= metrics["kl"] < 1e-3 and metrics["agreement"] > 0.9 and metrics["n"] > 20
    assert (metrics["scored_kl"], metrics["scored_agreement"]) == (metrics["kl"], metrics["agreement"]), "nothing is quantized here"
    assert {file.name for file in paths.out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {tensor.dtype for tensor in load_file(paths.out / "model.safetensors").values()} == {torch.bfloat16}
    # in the libraries alone
    merged = AutoModelForCausalLM.from_pretrained(paths.out, dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    ids = torch.tensor([tokenizer.encode("the red cat runs and the blue dog sleeps")])
    with torch.no_grad():
        ours = modeling.load_policy(model, paths.adapter, settings.model)(ids).logits.log_softmax(-1)
        before = modeling.load_base(model, settings.model)(ids).logits.log_softmax(-1)
        found = merged(ids).logits.log_softmax(-1)
    assert (found - ours).abs().max() < 0.1 < 1 < (before - ours).abs().max(), "and what was trained is in it"
    assert AutoTokenizer.from_pretrained(paths.out).eos_token_id == GenerationConfig.from_pretrained(paths.out).eos_token_id == tokenizer.eos_token_id


def test_weights_are_the_base_s_own_plus_the_adapter_rounded_once(settings, model, tmp_path):
    settings, paths = trained(settings, model, tmp_path, **{"model.quantization": "nf4"})
    merge.run(settings, paths)
    base, adapter, merged = (load_file(file) for file in (model / "model.safetensors", paths.adapter / "adapter_model.safetensors", paths.out / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"].float() for matrix in "AB")
    expected = base[f"{name}.weight"].float() + settings.lora.alpha / settings.lora.r * b @ a
    # float32 sums in another order may fall on the other side of a rounding
    torch.testing.assert_close(merged[f"{name}.weight"].float(), expected, rtol=2**-7, atol=1e-6)
    metrics = read_json(paths.metrics)
    assert 0 < 10 * metrics["kl"] < metrics["scored_kl"], "what was scored stands on rounded weights"


def test_a_merge_that_predicts_otherwise_is_refused(settings, model, tmp_path):
    settings, paths = trained(settings, model, tmp_path)
    settings = changed(settings, {"merge.max_kl": 1e-12})
    with pytest.raises(InputError, match=r"final: found a KL divergence .* expected at most 1e-12 and at least 0\.5 \(params\.yaml: merge\)"):
        merge.run(settings, paths)


def test_known_differences(settings, model, tmp_path):
    """Of two models whose predictions are known, over the labelled tokens alone."""

    class Known(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, likely: list[float]) -> None:
            super().__init__()
            self.logits = torch.tensor(likely).log()

        def forward(self, input_ids, logits_to_keep, use_cache):
            return Namespace(logits=self.logits.expand(1, len(logits_to_keep), -1))

    rows = [{"input_ids": [0, 1, 2, 3, 1, 2], "labels": [-100, 1, -100, -100, -100, 2], "seq_lengths": [3, 3]}]
    found = merge.differences(Known([0.5, 0.25, 0.25]), Known([0.25, 0.5, 0.25]), rows)
    assert found == {"kl": pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item()), "agreement": 0.0, "n": 2}
    assert merge.differences(Known([0.5, 0.25, 0.25]), Known([0.5, 0.25, 0.25]), rows) == {"kl": 0.0, "agreement": 1.0, "n": 2}


def test_a_model_can_be_talked_to(settings, model, tokenizer, tmp_path, monkeypatch, capsys):
    """What it says is what the libraries give for the whole conversation, and /new forgets it."""
    policy = modeling.load_base(model, settings.model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the red cat\nand the dog\n/new\nthe red cat\n\nnever read\n"))
    asked = []
    monkeypatch.setattr(chat, "answer", lambda model, tokenizer, said, *given, answer=chat.answer: asked.append((list(said), answer(model, tokenizer, said, *given))) or asked[-1][1])
    chat.talk(policy, tokenizer, 8, 0.0)
    turns = [[turn["content"] for turn in said] for said, _ in asked]
    answers = [answer for _, answer in asked]
    assert turns == [["the red cat"], ["the red cat", answers[0], "and the dog"], ["the red cat"]] and answers[0] == answers[2]
    for said, answer in asked:
        inputs = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = AutoModelForCausalLM.from_pretrained(model).generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        assert tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == answer
    assert "".join(answers[0].split()) in "".join(capsys.readouterr().out.split())
    long = [{"role": "user", "content": "the red cat " * 600}]
    with pytest.raises(InputError, match=r"what was said takes [\d,]+ tokens, and the model's context holds 1,024; /new starts anew"):
        chat.answer(policy, tokenizer, long, 8, 0.0)


def test_a_model_that_is_not_there_is_named(world):
    found = subprocess.run([sys.executable, "-m", "stages.chat", "final", "--models", str(world / "none")], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and "none/final: no such folder; `dvc repro merge` makes it, `dvc pull" in found.stderr
