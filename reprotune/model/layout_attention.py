"""Attention of rows that are prefix trees or decoding steps, for transformers' AttentionInterface."""

from typing import Any

import torch
from transformers import AttentionInterface

from reprotune.model.attention import refuse_extras
from reprotune.model.kv_slots import Prefill, Slots
from reprotune.model.shared_prefixes import PrefixTree

BY_LAYOUT = "by_layout"
"""The name of `attention_by_layout` in transformers' AttentionInterface."""

Layout = PrefixTree | Slots | Prefill
"""What a row holds, and how its tokens see each other."""


def attention_by_layout(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: None, scaling: float, layout: Layout, sliding_window: int | None = None, **extras: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of one row, (1, heads, tokens, width), by its layout; returns (1, tokens, heads, width).

    Raises:
        NotImplementedError: the layer asks for more than a layout computes.
    """
    refuse_extras(module, attention_mask, sliding_window, extras)
    return layout.attend(module.layer_idx, query[0], key[0], value[0], scaling, sliding_window)[None], None


AttentionInterface.register(BY_LAYOUT, attention_by_layout)
