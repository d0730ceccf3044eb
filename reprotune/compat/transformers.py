"""transformers: the private name of a config's attention."""

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
