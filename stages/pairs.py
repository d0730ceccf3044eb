"""Log-probs of pairs of answers to one prompt, computed by the reference and the DPO stage alike.

The prompt of a pair is computed once for both answers, and the head only where an answer's token is predicted. TRL asks for
pairs as rows of prompt and chosen, then of prompt and rejected, and gets its answers in that form.
"""

import math
import types
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from stages import InputError, checkpoints, training
from stages.attention import attend_by_segment, can_attend_by_segment
from stages.modeling import Policy, bare, measuring
from stages.templating import IGNORED

T = TypeVar("T", float, np.ndarray)

MEASURED = 512
"""Training pairs that DPO measures before and after, the first so many."""
PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")
"""What TRL's fused head gives for each token."""


def log_probs(
    policy: Policy, rows: datasets.Dataset, pad_token_id: int, batch_size: int, label: str, run: Path | None = None
) -> dict[str, list[float]]:
    """Summed log-probs, in nats, of each pair's chosen and rejected answer given its prompt, in the order of `rows`.

    Pairs of like length are computed together. The model has TRL's fused head, which computes only what labels ask for.
    With `run`, checkpoints of what is done are saved there, and the newest one is taken up.
    """
    collate = DataCollatorForPreference(pad_token_id)
    order = np.argsort(lengths(rows, False), kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def compute(indices: list[int]) -> list[float]:
        batch = {key: value.to(policy.device) for key, value in collate([rows[index] for index in indices]).items()}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        outputs = policy(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True)
        found = outputs.log_probs.float().sum(dim=1).tolist()
        if not all(map(math.isfinite, found)):
            raise InputError(f"{label}: the model gives a log-prob of {next(one for one in found if not math.isfinite(one))}; its adapter or base is damaged")
        return found

    with measuring(policy):
        sums = checkpoints.results(run, len(batches), lambda done: training.dealt_out(batches, compute, label, done))
    of_row = {index: (found[position], found[position + len(indices)]) for indices, found in zip(batches, sums, strict=True) for position, index in enumerate(indices)}
    return {"chosen": [of_row[index][0] for index in range(len(rows))], "rejected": [of_row[index][1] for index in range(len(rows))]}


def can_share_prompts(config: PreTrainedConfig) -> bool:
    """A mixture of experts also asks for its router's loss, which counts tokens."""
    return can_attend_by_segment(config) and not hasattr(config, "output_router_logits")


def share_prompts(policy: Policy) -> bool:
    """Have TRL's fused head, which the policy has, compute each prompt once for both answers; False where the model cannot."""
    model = bare(policy)
    with measuring(policy):
        if not can_share_prompts(model.config.get_text_config()) or not attend_by_segment(model):
            return False
    fused = model.forward

    def forward(self: PreTrainedModel, input_ids: torch.Tensor | None = None, *args: Any, fused_lm_head: bool = False, **kwargs: Any):
        if not fused_lm_head:
            return fused(input_ids, *args, **kwargs)
        return of_pairs(fused, input_ids, kwargs["attention_mask"], kwargs["labels"])

    model.forward = types.MethodType(forward, model)
    return True


def computed(rows: datasets.Dataset, at_once: int, shared_prompts: bool) -> np.ndarray:
    """Tokens that each pair is computed as, where so many are computed at once: without shared prompts, they are padded to the longest."""
    found = lengths(rows, shared_prompts)
    return found if shared_prompts else np.repeat(found.reshape(-1, at_once).max(axis=1), at_once)


def lengths(rows: datasets.Dataset, shared_prompts: bool) -> np.ndarray:
    """Tokens of each pair."""
    table = rows.with_format("arrow")[:]
    return length(*(pc.list_value_length(table[f"{name}_ids"]).to_numpy() for name in ("prompt", "chosen", "rejected")), shared_prompts)


def length(prompt: T, chosen: T, rejected: T, shared_prompts: bool) -> T:
    """Tokens of a pair: one row of prompt, chosen, the prompt's last token and rejected, or two of prompt and answer, of one length."""
    return prompt + chosen + 1 + rejected if shared_prompts else 2 * (prompt + np.maximum(chosen, rejected))


def of_pairs(fused, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> FusedCausalLMOutput:
    """What `fused` gives for rows [prompt, chosen] and then [prompt, rejected], from one row without padding: of each pair the prompt, chosen, the prompt's last token and
    rejected, which branches off there.

    The prompt's last token stands there twice because each answer's first token is predicted from it.

    Args:
        fused: forward of a model with TRL's fused head, and with attention by part.
        input_ids, attention_mask, labels: (2 × pairs, tokens), padded on the right; labels are IGNORED outside the answers.
    """
    pairs, width = len(input_ids) // 2, input_ids.shape[1]
    device = input_ids.device
    prompts = (labels[:pairs] != IGNORED).int().argmax(dim=1)
    chosen, rejected = attention_mask.sum(dim=1).split(pairs)
    ids, following, positions = [], [], []
    for number, (prompt, *ends) in enumerate(torch.stack([prompts, chosen, rejected], dim=1).tolist()):
        for row, start, end in zip((number, pairs + number), (0, prompt - 1), ends, strict=True):
            ids.append(input_ids[row, start:end])
            # the last token of an answer predicts nothing
            following.append(torch.nn.functional.pad(labels[row, start + 1 : end], (0, 1), value=IGNORED))
            positions.append(torch.arange(start, end, device=device))
    found = fused(
        torch.cat(ids)[None], attention_mask=None, position_ids=torch.cat(positions)[None], shift_labels=torch.cat(following)[None], fused_lm_head=True
    )
    # back to a row an answer, and from the place that predicts to the token before the predicted one
    begin = (chosen + rejected - prompts + 1).cumsum(0) - (chosen + rejected - prompts + 1)
    column = torch.arange(width - 1, device=device)[None]
    wanted = labels[:, 1:] != IGNORED
    index = torch.cat([begin[:, None] + column, (begin + chosen - prompts + 1)[:, None] + column]).masked_fill(~wanted, 0)

    def spread(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[0].index_select(0, index.flatten()).view_as(index).masked_fill(~wanted, 0)

    return FusedCausalLMOutput(**{name: spread(getattr(found, name)) for name in PER_TOKEN})
