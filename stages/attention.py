"""Attention over several texts that lie one behind another in one row, told apart by their positions, for transformers' AttentionInterface.

A text begins where the position is 0. It may branch: where positions fall back to p > 0, what follows sees the text's first p tokens and itself. sdpa would
compute all pairs of tokens of the row, under a mask that its fast kernels do not take.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

BY_PART = "sdpa_by_part"
"""Name, among transformers' attentions, of the one below."""


class Part(NamedTuple):
    """A text or a branch."""

    length: int
    seen: int
    """Tokens of the text before it that it sees."""


def attention_by_part(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, scaling: float,
    position_ids: torch.Tensor, dropout: float = 0.0, sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """(rows, tokens, heads, width).

    Args:
        query: (rows, heads, tokens, width); key and value have as many heads or a divisor of that.
        position_ids: (1, tokens), the same in all rows.
    """
    own = parts(position_ids)
    split = (whole.split([part.length for part in own], dim=2) for whole in (query, key, value))
    found, text = [], ()
    for (_, seen), queries, *branch in zip(own, *split, strict=True):
        if seen:
            branch = [torch.cat([before[:, :, :seen], after], dim=2) for before, after in zip(text, branch, strict=True)]
        else:
            text = branch
        found.append(causal(queries, *branch, scaling, dropout, sliding_window))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_PART, attention_by_part)


def parts(position_ids: torch.Tensor) -> list[Part]:
    """Found once for all layers: reading positions from a GPU waits for it."""
    if not hasattr(position_ids, "parts"):
        row = position_ids[0]
        starts = [0, *((row[1:] != row[:-1] + 1).nonzero()[:, 0] + 1).tolist()]
        position_ids.parts = [Part(end - start, seen) for start, end, seen in zip(starts, [*starts[1:], len(row)], row[starts].tolist(), strict=True)]
    return position_ids.parts


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float = 0.0, window: int | None = None
) -> torch.Tensor:
    """Each query, of which the last stands where the last key does, sees the keys up to its own place; shapes as above."""
    queries, keys = query.shape[2], key.shape[2]
    groups, mask = query.shape[1] // key.shape[1], None
    if queries < keys or (window is not None and keys > window):
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if window is not None:
            mask = mask.triu(keys - queries + 1 - window)
    return scaled_dot_product_attention(query, repeat_kv(key, groups), repeat_kv(value, groups), mask, dropout, is_causal=mask is None, scale=scaling)
