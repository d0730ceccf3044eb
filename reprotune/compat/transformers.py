"""transformers: the private name of a config's attention, and files that its version 4 reads as it should."""

from typing import Any

from transformers import PreTrainedConfig


def attention_of(config: PreTrainedConfig) -> str | None:
    """Name of the attention that a model with this config computes, as `AttentionInterface` lists it.

    There is a public way to set it (`set_attn_implementation`) and none to read it. Seen with transformers
    5.23.0.
    """
    return config._attn_implementation


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Choose the attention of a config that has no model yet. Seen with transformers 5.23.0."""
    config._attn_implementation = name


NEW_IN_ROPE = {"rope_theta", "rope_type", "partial_rotary_factor"}
"""Keys of `rope_parameters` that stand elsewhere in version 4's config."""
OLD_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""By model_type, version 4's own names of these keys."""


def config_for_4(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config.json with its rotary positions also where version 4 looks for them.

    Version 5 writes them to `rope_parameters` alone. Version 4 ignores that key and takes its default: the
    model loads without a word and predicts otherwise. Keys that are there already stay. Seen with
    transformers 5.23.0 and 4.57.6.
    """
    config = {key: config_for_4(value) if key == "text_config" else value for key, value in config.items()}
    ropes = config.get("rope_parameters") or {}
    by_kind = {kind: rope for kind, rope in ropes.items() if isinstance(rope, dict)}
    rope, old = by_kind.get("full_attention", ropes), {}
    names = OLD_NAMES.get(config["model_type"], {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            old[names.get(key, key)] = rope[key]
    if (kind := rope.get("rope_type", "default")) != "default":
        # Phi's longrope goes by another name, and has its length outside alone
        outside = NEW_IN_ROPE | (config.keys() if kind == "longrope" else set())
        scaling = {key: value for key, value in rope.items() if key not in outside}
        old["rope_scaling"] = {"type" if kind == "longrope" else "rope_type": kind, **scaling}
    if "sliding_attention" in by_kind:
        old["rope_local_base_freq"] = by_kind["sliding_attention"]["rope_theta"]
    return old | config


def tokenizer_config_for_4(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that versions 4 and 5 read alike: tokenizer.json as it is written.

    Version 4 knows no class TokenizersBackend, and takes a dict alone for `extra_special_tokens`. A class of
    one model family would build parts of the tokenizer anew, differently in the two versions. Seen with
    transformers 5.23.0 and 4.57.6.
    """
    config = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
