"""Rows that hold several examples, one behind another, told apart by their positions: what is checked before they are trained on, and their loss.

The examples of a micro-batch are laid out as one such row, packed or not.
"""

from itertools import accumulate, pairwise

import datasets
import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from stages import InputError
from stages.modeling import Policy, measuring
from stages.params import Model
from stages.templating import IGNORED
from stages.training import dealt_out

ISOLATION = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference of a logit between an example alone and behind another one; a leak was seen to make 22."""
PROBED = 64
"""Tokens of each example that are compared."""


def check_isolation(model: Policy, rows: datasets.Dataset, settings: Model) -> None:
    """Stop before a model is trained whose attention lets an example see the one that it is packed behind.

    Raises:
        InputError: the second of the first two examples has other logits behind the first than alone.
    """
    found: list[list[int]] = []
    for row in rows:
        starts = [0, *accumulate(row["seq_lengths"])]
        found += [row["input_ids"][start:end][:PROBED] for start, end in pairwise(starts)]
        if len(found) > 1:
            break
    else:
        return
    first, second = (torch.tensor([ids], device=model.device) for ids in found[:2])
    positions = torch.cat([torch.arange(ids.shape[1], device=model.device) for ids in (first, second)])[None]
    with measuring(model), torch.autocast(model.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        alone = model(input_ids=second, use_cache=False).logits[0]
        behind = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits[0, first.shape[1] :]
    difference = float((behind - alone).abs().max())
    if not alone.isfinite().all():
        raise InputError("models/base: it computes logits that are not finite; correct model.source, or model.dtype")
    if not difference <= ISOLATION[settings.dtype]:
        raise InputError(
            f"params.yaml: model.attention: {settings.attention} attention lets examples see those that they are packed behind: a logit differs by "
            f"{difference:.3g}, expected at most {ISOLATION[settings.dtype]}; use one that keeps them apart (sdpa does for Llama and Qwen models)"
        )


def check_labels(rows: datasets.Dataset) -> None:
    """Stop before rows are trained on that nothing is learned from.

    Raises:
        InputError: a row has no label.
    """
    labels = rows.data.column("labels").combine_chunks()
    starts = labels.offsets.to_numpy()[:-1]
    found = np.logical_or.reduceat(labels.flatten().to_numpy() != IGNORED, starts)
    if not found.all():
        raise InputError(f"data/tokenized/sft: row {int(np.argmin(found))} has no label to train on; `dvc repro tokenize_sft` makes the rows anew")


def loss_per_token(model: Policy, rows: datasets.Dataset, pad_token_id: int, batch_size: int, label: str) -> float:
    """Mean negative log-likelihood, in nats, of the labelled tokens of packed rows."""
    collate = DataCollatorForLanguageModeling(pad_token_id, padding_free=True)

    def loss(start: int) -> tuple[float, int]:
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        inputs = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        outputs = model(**inputs, fused_lm_head=True)
        return -float(outputs.log_probs.double().sum()), int(outputs.label_mask.sum())

    with measuring(model):
        losses, counts = zip(*dealt_out(range(0, len(rows), batch_size), loss, label), strict=True)
    return sum(losses) / sum(counts)
