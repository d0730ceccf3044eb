"""Attention of one sequence in float64, written out: what every faster one must agree with."""

from argparse import Namespace

import torch

HEADS, KEY_HEADS, WIDTH, SCALING = 4, 2, 8, 0.3
PLAIN = Namespace(config=Namespace(layer_types=None), layer_idx=0)
"""A layer that asks for nothing special."""


def projections(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values of a row, (heads, tokens, width)."""
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (
        torch.randn(heads, tokens, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    return query, key, value


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """(tokens, heads, width) of one sequence, (heads, tokens, width)."""
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=0).double() for part in (key, value))
    scores = SCALING * query.double() @ key.transpose(1, 2)
    positions = torch.arange(query.shape[1])
    distance = positions[:, None] - positions
    unseen = (distance < 0) | (distance >= (window or len(positions)))
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ value).transpose(0, 1).float()
