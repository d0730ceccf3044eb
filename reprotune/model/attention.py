"""Attention for rows that hold several sequences, told apart by their positions alone.

Position 0 begins a sequence; a fall back to position p > 0 begins a continuation, which sees the first p
tokens of that sequence and itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from reprotune.compat.transformers import attention_of
from reprotune.model.probing import SHARED_PREFIX, row_mismatch

BY_SEGMENT = "sdpa_by_segment"
"""The name of `attention_by_segment` in transformers' AttentionInterface."""


class Segment(NamedTuple):
    """A sequence, or a continuation of one."""

    length: int
    prefix: int
    """Tokens of the sequence that a continuation sees; 0 for a sequence."""


def attention_by_segment(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: None, scaling: float, position_ids: torch.Tensor, dropout: float = 0.0,
    sliding_window: int | None = None, **extras: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each segment of a row and to its prefix; returns (rows, tokens, heads, width).

    sdpa would compute every pair of tokens of the row, under a mask that its fast kernels do not take.

    Args:
        query: (rows, heads, tokens, width); key and value have as many heads or a divisor of that.
        position_ids: (1, tokens), the same in all rows.

    Raises:
        NotImplementedError: the layer asks for more than `causal` computes.
    """
    refuse_extras(module, attention_mask, sliding_window, extras)
    row = segments(position_ids)
    lengths = [segment.length for segment in row]
    split = (whole.split(lengths, dim=2) for whole in (query, key, value))
    outputs: list[torch.Tensor] = []
    sequence: tuple[torch.Tensor, ...] = ()
    for segment, queries, *seen in zip(row, *split, strict=True):
        if segment.prefix:
            prefix = (part[:, :, : segment.prefix] for part in sequence)
            seen = [torch.cat(parts, dim=2) for parts in zip(prefix, seen, strict=True)]
        else:
            sequence = tuple(seen)
        outputs.append(causal(queries, seen[0], seen[1], scaling, dropout, sliding_window))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_SEGMENT, attention_by_segment)


def refuse_extras(
    module: torch.nn.Module, mask: torch.Tensor | None, window: int | None, extras: Mapping[str, Any]
) -> None:
    """Raise NotImplementedError if a layer asks for more than `causal` computes, or keeps its window back."""
    arguments = {"attention_mask": mask}
    arguments |= {name: extras.get(name) for name in ("position_bias", "s_aux", "softcap")}
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"its attention was given {name}")
    kinds = getattr(module.config, "layer_types", None)
    if window is None and kinds and kinds[module.layer_idx] == "sliding_attention":
        raise NotImplementedError("the window of a layer is not known")


def segments(position_ids: torch.Tensor) -> list[Segment]:
    """The segments of a row, kept with its positions: each reading of those would wait for the GPU."""
    if not hasattr(position_ids, "segments"):
        row = position_ids[0]
        starts = [0, *((row[1:] != row[:-1] + 1).nonzero()[:, 0] + 1).tolist()]
        ends, prefixes = [*starts[1:], len(row)], row[starts].tolist()
        position_ids.segments = [
            Segment(end - start, prefix) for start, end, prefix in zip(starts, ends, prefixes, strict=True)
        ]
    return position_ids.segments


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float,
    dropout: float = 0.0, window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of the last tokens to all: query i of n stands where key i + (keys - n) does.

    Shapes are those of `attention_by_segment`, here and in the result (rows, heads, queries, width).
    """
    queries, keys = query.shape[2], key.shape[2]
    groups, mask = query.shape[1] // key.shape[1], None
    if queries < keys or (window is not None and keys > window):
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if window is not None:
            mask = mask.triu(keys - queries + 1 - window)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling
    )


def has_plain_attention(config: PreTrainedConfig) -> bool:
    """Whether all layers attend causally or in a sliding window, at positions that ignore a row's length."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    ropes = getattr(config, "rope_parameters", None) or {}
    rope_types = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, Mapping)}
    return kinds <= {"full_attention", "sliding_attention"} and not rope_types & {"dynamic", "longrope"}


def can_attend_by_segment(config: PreTrainedConfig) -> bool:
    return attention_of(config) == "sdpa" and has_plain_attention(config)


def attend_by_segment(model: PreTrainedModel) -> bool:
    """Switch a model in eval mode to attention by segment, if that leaves the logits of a probe as they are.

    Returns:
        Whether the model attends by segment now.
    """
    config = model.config.get_text_config()
    if attention_of(config) == BY_SEGMENT or not can_attend_by_segment(config):
        return attention_of(config) == BY_SEGMENT

    def logits_in_one_row(sequence: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(sequence), device=model.device)
        positions = torch.cat([positions, positions[SHARED_PREFIX : len(branch)]])
        tokens = torch.cat([sequence, branch[SHARED_PREFIX:]])
        model.set_attn_implementation(BY_SEGMENT)
        logits = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0]
        whole, continuation = logits.split([len(sequence), len(tokens) - len(sequence)])
        return torch.cat([whole, whole[:SHARED_PREFIX], continuation])

    mismatch = row_mismatch(model, logits_in_one_row)
    if mismatch is not None:
        model.set_attn_implementation("sdpa")
        name = type(model).__name__
        print(f"{name} cannot attend by segment ({mismatch}); more tokens are computed", flush=True)
    return mismatch is None
