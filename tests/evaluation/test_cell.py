"""A cell: its protocol is all that can move its score, and a killed one ends with the same bytes."""

import argparse
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from reprotune import params
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.evaluation import cell, generation
from reprotune.evaluation.forward import SharedForward
from reprotune.model import loading, saving
from reprotune.records import read_metrics, read_parquet, write_parquet
from tests.conftest import changed
from tests.tiny import ROOT


def run_cell(name: str, settings: params.Params, data, model, folder, adapter=None) -> dict:
    paths = argparse.Namespace(
        base=model,
        adapter=adapter,
        data=data / name,
        templates=ROOT / "templates",
        checkpoints=folder / "checkpoints",
        samples=folder / "samples.parquet",
        metrics=folder / "metrics.json",
    )
    cell.run(settings, name, paths)
    return read_metrics(folder / "metrics.json")


def protocol_parts(metrics: dict) -> dict[str, str]:
    return dict(part.split(": ", 1) for part in metrics["protocol_parts"])


def test_a_protocol_is_all_that_can_move_a_score(data, settings, model, tmp_path):
    """What cannot move a score is no part of it."""
    name = "gsm8k"
    first = run_cell(name, settings, data, model, tmp_path)
    parts = protocol_parts(first)

    def changed_parts(metrics):
        others = protocol_parts(metrics)
        return {part for part in parts if parts[part] != others[part]}

    for values, moved in (
        ({"evaluate.batch_tokens": 1, "evaluate.batch_texts": 1, "evaluate.benchmarks": ["gsm8k"]}, set()),
        ({"benchmarks.gsm8k.num_fewshot": 2}, {"num_fewshot", "prompts"}),
        ({"benchmarks.gsm8k.limit": 5}, {"rows", "prompts"}),
        ({"benchmarks.gsm8k.max_new_tokens": 4}, {"generation", "prompts"}),
        ({"benchmarks.gsm8k.metric": "exact_match,strict-match"}, {"metric"}),
        ({"evaluate.chat_template": True}, {"chat_template", "prompts"}),
        ({"seed": 7}, {"rows", "prompts"}),
        ({"model.dtype": "bfloat16"}, {"dtype"}),
        ({"model.quantization": "nf4"}, {"quantization"}),
    ):
        second = run_cell(name, changed(settings, values), data, model, tmp_path)
        assert changed_parts(second) == moved, values
        assert (second["protocol"] == first["protocol"]) is not bool(moved)
    rows = read_parquet(data / name / "test.parquet").to_pylist()
    write_parquet(data / name / "test.parquet", [rows[0] | {"answer": "#### 5"}, *rows[1:]])
    assert "data" in changed_parts(run_cell(name, settings, data, model, tmp_path))


def test_a_second_protocol_stands_beside_the_first(data, settings, model, tmp_path):
    """Another entry for the same task asks in chat turns, through the model's own template."""
    content = settings.model_dump()
    chat_entry = content["benchmarks"]["gsm8k"] | {"task": "gsm8k", "chat_template": True}
    content["benchmarks"]["gsm8k_chat"] = chat_entry
    both = params.Params.model_validate(content)
    names = ("gsm8k", "gsm8k_chat")
    shutil.copytree(data / "gsm8k", data / "gsm8k_chat")
    first, second = (run_cell(name, both, data, model, tmp_path / name) for name in names)
    assert first["protocol"] != second["protocol"]
    plain, chat = (read_parquet(tmp_path / name / "samples.parquet")["prompt"].to_pylist() for name in names)
    assert all(prompt.startswith("Question:") for prompt in plain)
    assert all(prompt.startswith("<|im_start|>") for prompt in chat)
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in chat)


@pytest.mark.parametrize("own", [{}, {"repetition_penalty": 5.0}])
def test_all_models_of_a_run_decode_alike(own, data, settings, model, tmp_path):
    """The base, a new adapter on it and all of its weights, saved, give the same texts.

    The base's own settings and its own end of a text hold for all, and stand in the protocol.
    """
    base = shutil.copytree(model, tmp_path / "base")
    weights = load_file(model / "model.safetensors")
    # a random model is nearly indifferent: larger weights make its texts differ
    save_file(
        {key: 3 * weight for key, weight in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 40, 41], **own}))
    settings = changed(settings, {"benchmarks.gsm8k.max_new_tokens": 16, "benchmarks.gsm8k.limit": 3})
    tokenizer = load_tokenizer(base, ROOT / "templates" / "chatml.jinja")
    generated, protocols = [], []
    for method in ("base", "lora", "full"):
        folder = tmp_path / method if method != "base" else None
        if folder:
            lora = changed(settings, {"lora.method": method}).lora
            policy = loading.new_policy(base, settings.model, lora, 1)
            saving.save_policy(policy, tokenizer, base, "float32", folder)
        metrics = run_cell("gsm8k", settings, data, base, tmp_path, folder)
        protocols.append((metrics["protocol"], protocol_parts(metrics)))
        generated.append(read_parquet(tmp_path / "samples.parquet")["generation"].to_pylist())
    assert generated[0] == generated[1] == generated[2] and len(set(generated[0])) > 1
    assert protocols[0] == protocols[1] == protocols[2]
    ends = sorted(["<|endoftext|>", "<|im_end|>", *tokenizer.convert_ids_to_tokens([40, 41])])
    assert json.loads(protocols[0][1]["decoding"]) == {"ends": ends, **own}
    # what greedy decoding does not follow, or a task sets itself, is no part of it
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [41, 0, 40], "top_p": 0.5, "do_sample": True, "max_new_tokens": 3, **own})
    )
    assert run_cell("gsm8k", settings, data, base, tmp_path)["protocol"] == protocols[0][0]
    assert protocol_parts(run_cell("hellaswag", settings, data, base, tmp_path))["decoding"] == "none"


@pytest.mark.parametrize(("name", "killed_at"), [("hellaswag", 5), ("gsm8k", 30)])
def test_a_killed_cell_goes_on_to_the_same_bytes(
    name, killed_at, data, settings, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("REPROTUNE_CHECKPOINT_SECONDS", "0")
    monkeypatch.setattr(generation, "ROUNDS", 1)
    values = {"evaluate.batch_tokens": 64, "evaluate.batch_texts": 1, f"benchmarks.{name}.limit": None}
    settings, whole, killed = changed(settings, values), tmp_path / "whole", tmp_path / "killed"
    stock = SharedForward.logits

    def passes(folder, kill_at=None):
        """Run the cell, and count its forward passes."""
        count = 0

        def counted(self, *arguments):
            nonlocal count
            count += 1
            if count == kill_at:
                raise KeyboardInterrupt
            return stock(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(SharedForward, "logits", counted)
            run_cell(name, settings, data, model, folder)
        return count

    all_passes = passes(whole)
    with pytest.raises(KeyboardInterrupt):
        passes(killed, kill_at=killed_at)
    assert list((killed / "checkpoints").rglob("checkpoint-*"))
    assert 0 < passes(killed) < all_passes
    for file in ("samples.parquet", "metrics.json"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    assert not list((killed / "checkpoints").rglob("checkpoint-*"))


def test_vllm_is_refused_where_it_is_not(settings, data, model, tmp_path):
    message = r"evaluate\.backend: found 'vllm', which is not installed; `pip install"
    with pytest.raises(InputError, match=message):
        run_cell("gsm8k", changed(settings, {"evaluate.backend": "vllm"}), data, model, tmp_path)
