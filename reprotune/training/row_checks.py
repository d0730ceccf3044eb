"""Checks of packed rows before SFT: no example attends to another one, and every row has a label."""

from itertools import accumulate, pairwise

import datasets
import numpy as np
import torch

from reprotune.data.chat_tokens import IGNORED
from reprotune.errors import InputError
from reprotune.model.policies import Policy, measuring
from reprotune.model.probing import LOGIT_TOLERANCE
from reprotune.params import Model

PROBED = 64
"""Tokens of each example whose logits are compared."""


def check_isolation(model: Policy, rows: datasets.Dataset, settings: Model) -> None:
    """Compare the logits of the second example alone with those behind the first one in a row.

    Raises:
        InputError: they differ, so that attention reaches across examples, or are not finite.
    """
    examples = first_two_examples(rows)
    if len(examples) < 2:
        return
    first, second = (torch.tensor([ids], device=model.device) for ids in examples)
    positions = torch.cat([torch.arange(ids.shape[1], device=model.device) for ids in (first, second)])[None]
    with (
        measuring(model),
        torch.autocast(model.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"),
    ):
        alone = model(input_ids=second, use_cache=False).logits[0]
        behind = model(
            input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False
        ).logits[0, first.shape[1] :]
    if not alone.isfinite().all():
        raise InputError(
            "models/base: it computes logits that are not finite; correct model.source, or model.dtype"
        )
    difference = float((behind - alone).abs().max())
    tolerance = LOGIT_TOLERANCE[getattr(torch, settings.dtype)]
    if not difference <= tolerance:
        raise InputError(
            f"params.yaml: model.attention: found {settings.attention}, under which packed examples attend "
            f"to the ones before them: a logit differs by {difference:.3g}, expected at most {tolerance}; "
            "use one that isolates them, as sdpa does for Llama and Qwen models"
        )


def first_two_examples(rows: datasets.Dataset) -> list[list[int]]:
    """Up to PROBED tokens of each; fewer than two if there are no more."""
    examples: list[list[int]] = []
    for row in rows:
        starts = [0, *accumulate(row["seq_lengths"])]
        examples += [row["input_ids"][start:end][:PROBED] for start, end in pairwise(starts)]
        if len(examples) > 1:
            break
    return examples[:2]


def check_labels(rows: datasets.Dataset) -> None:
    """Check that every row has a token to train on.

    Raises:
        InputError: a row has none.
    """
    labels = rows.data.column("labels").combine_chunks()
    starts = labels.offsets.to_numpy()[:-1]
    has_label = np.logical_or.reduceat(labels.flatten().to_numpy() != IGNORED, starts)
    if not has_label.all():
        raise InputError(
            f"data/tokenized/sft: row {int(np.argmin(has_label))} has no label to train on; "
            "`dvc repro tokenize_sft` makes the rows anew"
        )
