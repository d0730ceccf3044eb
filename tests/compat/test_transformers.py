"""transformers: the private name of a config's attention, and configs that version 4 reads as well."""

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reprotune.compat.transformers import attention_of, config_for_4, set_attention
from reprotune.records import read_json, write_json
from tests.tiny import make_policy

LLAMA_3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
SMALL = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    "sliding_window": 16, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip


def test_the_attention_of_a_config_is_known_and_has_no_public_name():
    model = make_policy("qwen3", "eager")
    assert attention_of(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert attention_of(model.config) == "sdpa"
    public = {name for name in dir(model.config) if "attn_implementation" in name and name[0] != "_"}
    assert not public, "a public name could replace attention_of"


def test_a_model_takes_the_attention_of_its_config():
    config = make_policy("qwen3", "eager").config
    set_attention(config, "sdpa")
    assert attention_of(config) == "sdpa"
    assert attention_of(AutoModelForCausalLM.from_config(config).config) == "sdpa"


@pytest.mark.parametrize(
    ("kind", "ropes", "old"),
    [
        ("qwen3", {"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e6}),
        (
            "llama",
            {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA_3},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 2e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "gpt_neox",
            {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
        ),
        (
            "stablelm",
            {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
        ),
        (
            "phi3",
            {"rope_theta": 1e4, "rope_type": "longrope", "original_max_position_embeddings": 512, **LONG},
            {"rope_theta": 1e4, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "longrope", **LONG}},
        ),
    ],
)
def test_rotary_positions_stand_where_version_4_looks(kind, ropes, old, tmp_path):
    """Version 4.57.6 gave the same logits for each of these; version 5 still does, with both names there."""
    options = {"original_max_position_embeddings": 512} if kind == "phi3" else {}
    config = AutoConfig.for_model(kind, **SMALL, rope_parameters=ropes, **options)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "5")
    shutil.copytree(tmp_path / "5", tmp_path / "both")
    written = read_json(tmp_path / "5" / "config.json")
    both = config_for_4(written)
    assert {key: both[key] for key in both.keys() - written.keys()} == old
    assert config_for_4({"model_type": "mixed", "text_config": written})["text_config"] == both
    assert config_for_4(both) == both
    write_json(tmp_path / "both" / "config.json", both)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("5", "both")
        )
    assert torch.equal(first, second)


def test_positions_that_are_not_rotary_are_left_alone():
    config = {"model_type": "gpt2", "n_embd": 64}
    assert config_for_4(config) == config
