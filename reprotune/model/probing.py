"""Test whether several sequences in one row keep the logits that each has alone."""

from collections.abc import Callable

import torch

from reprotune.errors import first_line

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Largest difference, by dtype, between a sequence's logits alone and in a row with others. A leak was seen
to make 22."""
PROBE_LENGTH = 16
"""Tokens of each of the two sequences that `row_mismatch` computes."""
SHARED_PREFIX = 8
"""Tokens that these two have in common."""


def row_mismatch(
    model: torch.nn.Module, logits_in_one_row: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> str | None:
    """Why two sequences with a common prefix have other logits in one row than alone; None if they do not.

    Args:
        model: in eval mode, attending as it does by itself.
        logits_in_one_row: given both sequences, (PROBE_LENGTH,) each, returns the logits of the first and
            then of the second, (2 * PROBE_LENGTH, vocabulary).
    """
    device = next(model.parameters()).device
    tokens = torch.arange(1, 1 + PROBE_LENGTH + SHARED_PREFIX, device=device)
    tokens %= model.config.get_text_config().vocab_size
    first = tokens[:PROBE_LENGTH]
    second = torch.cat([tokens[:SHARED_PREFIX], tokens[PROBE_LENGTH:]])
    with torch.no_grad():
        alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)]
        try:
            largest = float((logits_in_one_row(first, second) - torch.cat(alone)).abs().max())
        except Exception as error:
            return first_line(error)
    return None if largest <= LOGIT_TOLERANCE[alone[0].dtype] else f"a logit differs by {largest:.2g}"
