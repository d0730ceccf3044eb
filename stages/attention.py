"""Attention over several texts that lie one behind another in one row, told apart by their positions, for transformers' AttentionInterface.

A text begins where the position is 0. It may branch: where positions fall back to p > 0, what follows sees the text's first p tokens and itself. sdpa would
compute all pairs of tokens of the row, under a mask that its fast kernels do not take.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from stages import first_line

BY_SEGMENT = "sdpa_by_segment"
"""Name, among transformers' attentions, of the one below."""
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Largest difference of a logit, by the weights' type; a leak was seen to make 22."""
PROBED = 64
"""Tokens that are computed both ways."""


class Segment(NamedTuple):
    """A text or a branch."""

    length: int
    seen: int
    """Tokens of the text before it that it sees."""


def attention_by_segment(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, scaling: float,
    position_ids: torch.Tensor, dropout: float = 0.0, sliding_window: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """(rows, tokens, heads, width).

    Args:
        query: (rows, heads, tokens, width); key and value have as many heads or a divisor of that.
        position_ids: (1, tokens), the same in all rows.
    """
    given = {"attention_mask": attention_mask, **{name: more.get(name) for name in ("position_bias", "s_aux", "softcap")}}
    if odd := [name for name, value in given.items() if value is not None]:
        raise NotImplementedError(f"attention by segment was given {odd[0]}")
    own = segments(position_ids)
    split = (whole.split([segment.length for segment in own], dim=2) for whole in (query, key, value))
    found, text = [], ()
    for (_, seen), queries, *branch in zip(own, *split, strict=True):
        if seen:
            branch = [torch.cat([before[:, :, :seen], after], dim=2) for before, after in zip(text, branch, strict=True)]
        else:
            text = branch
        found.append(causal(queries, *branch, scaling, dropout, sliding_window))
    return torch.cat(found, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_SEGMENT, attention_by_segment)


def segments(position_ids: torch.Tensor) -> list[Segment]:
    """Found once for all layers: reading positions from a GPU waits for it."""
    if not hasattr(position_ids, "segments"):
        row = position_ids[0]
        starts = [0, *((row[1:] != row[:-1] + 1).nonzero()[:, 0] + 1).tolist()]
        position_ids.segments = [Segment(end - start, seen) for start, end, seen in zip(starts, [*starts[1:], len(row)], row[starts].tolist(), strict=True)]
    return position_ids.segments


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


def can_attend_by_segment(config: PreTrainedConfig) -> bool:
    """Whether the layers of a model all attend, through sdpa, to what comes before, or to a sliding window of it."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config._attn_implementation == "sdpa" and kinds <= {"full_attention", "sliding_attention"}


def attend_by_segment(model: PreTrainedModel) -> bool:
    """Switch a model in eval mode to attention by segment, if a text and a branch of it then have the logits that each has alone; False if it stays as it is."""
    config = model.config.get_text_config()
    if config._attn_implementation == BY_SEGMENT or not can_attend_by_segment(config):
        return config._attn_implementation == BY_SEGMENT
    ids = torch.arange(1, 2 * PROBED, device=model.device) % config.vocab_size
    half = PROBED // 2
    text, branch = ids[:PROBED], torch.cat([ids[:half], ids[PROBED:]])
    positions = torch.cat([torch.arange(len(text), device=model.device), torch.arange(half, len(branch), device=model.device)])
    with torch.no_grad():
        alone = [model(input_ids=one[None], use_cache=False).logits[0] for one in (text, branch)]
        model.set_attn_implementation(BY_SEGMENT)
        try:
            together = model(input_ids=torch.cat([text, branch[half:]])[None], position_ids=positions[None], use_cache=False).logits[0]
            difference = float((together - torch.cat([alone[0], alone[1][half:]])).abs().max())
            reason = None if difference <= CLOSE[alone[0].dtype] else f"a logit differs by {difference:.2g}"
        except Exception as error:
            reason = first_line(error)
    if reason is not None:
        model.set_attn_implementation("sdpa")
        print(f"{type(model).__name__} cannot attend by segment ({reason}): it computes more tokens", flush=True)
    return reason is None
