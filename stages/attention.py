"""Attention over several texts that lie one behind another in one row, told apart by their positions, for transformers' AttentionInterface.

A text begins where the position is 0. It may branch: where positions fall back to p > 0, what follows sees the text's first p tokens and itself. sdpa would
compute all pairs of tokens of the row, under a mask that its fast kernels do not take.
"""

from collections.abc import Callable, Mapping
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
PROBED, HALF = 16, 8
"""Tokens of each text that is computed both ways, and how many of them it has in common with another."""


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
    check_plain(module, attention_mask, sliding_window, more)
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


def check_plain(module: torch.nn.Module, mask: torch.Tensor | None, window: int | None, more: Mapping[str, Any]) -> None:
    """Raises NotImplementedError if a layer asks for what `causal` does not compute, or has a window that it keeps to itself."""
    given = {"attention_mask": mask, **{name: more.get(name) for name in ("position_bias", "s_aux", "softcap")}}
    if odd := [name for name, value in given.items() if value is not None]:
        raise NotImplementedError(f"its attention was given {odd[0]}")
    kinds = getattr(module.config, "layer_types", None)
    if window is None and kinds and kinds[module.layer_idx] == "sliding_attention":
        raise NotImplementedError("the window of a layer is not known")


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


def is_plain(config: PreTrainedConfig) -> bool:
    """Whether the layers of a model all attend to what comes before, or to a sliding window of it, at positions that are the same in a row of several texts."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    ropes = getattr(config, "rope_parameters", None) or {}
    by_length = {one.get("rope_type") for one in (ropes, *ropes.values()) if isinstance(one, Mapping)} & {"dynamic", "longrope"}
    return kinds <= {"full_attention", "sliding_attention"} and not by_length


def can_attend_by_segment(config: PreTrainedConfig) -> bool:
    """Whether a model is plain and attends through sdpa."""
    return config._attn_implementation == "sdpa" and is_plain(config)


def attend_by_segment(model: PreTrainedModel) -> bool:
    """Switch a model in eval mode to attention by segment, if a text and a branch of it then have the logits that each has alone; False if it stays as it is."""
    config = model.config.get_text_config()
    if config._attn_implementation == BY_SEGMENT or not can_attend_by_segment(config):
        return config._attn_implementation == BY_SEGMENT

    def together(text: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        positions = torch.cat([torch.arange(len(text), device=model.device), torch.arange(HALF, len(branch), device=model.device)])
        model.set_attn_implementation(BY_SEGMENT)
        logits = model(input_ids=torch.cat([text, branch[HALF:]])[None], position_ids=positions[None], use_cache=False).logits[0]
        return torch.cat([logits[: len(text)], logits[:HALF], logits[len(text) :]])

    reason = difference(model, together)
    if reason is not None:
        model.set_attn_implementation("sdpa")
        print(f"{type(model).__name__} cannot attend by segment ({reason}): it computes more tokens", flush=True)
    return reason is None


def difference(model: torch.nn.Module, together: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> str | None:
    """Why two texts of PROBED tokens, of which HALF are the same, do not have the logits together that each has alone; None if they do.

    Args:
        together: of both, (tokens,), the logits, one behind the other, (tokens of both, vocabulary).
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, 1 + PROBED + HALF, device=device) % model.config.get_text_config().vocab_size
    text, branch = ids[:PROBED], torch.cat([ids[:HALF], ids[PROBED:]])
    with torch.no_grad():
        alone = torch.cat([model(input_ids=one[None], use_cache=False).logits[0] for one in (text, branch)])
        try:
            largest = float((together(text, branch) - alone).abs().max())
        except Exception as error:
            return first_line(error)
    return None if largest <= CLOSE[alone.dtype] else f"a logit differs by {largest:.2g}"
