"""Log-probs of preference pairs, for reference and DPO alike: each prompt is computed once for both answers.

TRL lays a batch of pairs out as rows [prompt, chosen] followed by rows [prompt, rejected], with padding.
"""

import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from reprotune.data.chat_tokens import IGNORED
from reprotune.errors import InputError
from reprotune.model.attention import attend_by_segment, can_attend_by_segment
from reprotune.model.policies import Policy, bare, measuring
from reprotune.training import checkpoints, distributed

T = TypeVar("T", float, np.ndarray)
Forward = Callable[..., FusedCausalLMOutput]

ANSWERS = ("chosen", "rejected")
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of tokens of a pair."""
REFERENCE = {"chosen": "ref_chosen_logps", "rejected": "ref_rejected_logps"}
"""Columns of the cached reference log-probs, by TRL's names."""
MEASURED = 512
"""Training pairs that DPO measures before and after: the first ones."""
PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")
"""What TRL's fused LM head returns for each token."""


def log_probs(
    policy: Policy,
    rows: datasets.Dataset,
    pad_token_id: int,
    batch_size: int,
    label: str,
    run: Path | None = None,
) -> dict[str, list[float]]:
    """Summed log-probs, in nats, of each pair's chosen and rejected answer, in the order of `rows`.

    Batches hold pairs of similar length.

    Args:
        policy: has TRL's fused LM head, which computes only positions with a label.
        run: a folder for checkpoints, to resume from; None computes without.

    Raises:
        InputError: a log-prob is not finite.
    """
    collate = DataCollatorForPreference(pad_token_id)
    order = np.argsort(lengths(rows, False), kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def compute(indices: list[int]) -> list[float]:
        return batch_log_probs(policy, collate([rows[index] for index in indices]), label)

    with measuring(policy):
        by_batch = checkpoints.results(
            run, len(batches), lambda done: distributed.dealt_out(batches, compute, label, done)
        )
    by_answer = {answer: [math.nan] * len(rows) for answer in ANSWERS}
    for indices, sums in zip(batches, by_batch, strict=True):
        for position, index in enumerate(indices):
            by_answer["chosen"][index] = sums[position]
            by_answer["rejected"][index] = sums[position + len(indices)]
    return by_answer


def batch_log_probs(policy: Policy, batch: Mapping[str, torch.Tensor], label: str) -> list[float]:
    """Summed log-probs of a batch as TRL collates it: of all chosen answers, then of all rejected ones.

    Raises:
        InputError: one is not finite.
    """
    batch = {key: value.to(policy.device) for key, value in batch.items()}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    outputs = policy(
        batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
    )
    sums = outputs.log_probs.float().sum(dim=1).tolist()
    for value in sums:
        if not math.isfinite(value):
            raise InputError(
                f"{label}: the model gives a log-prob of {value}, expected a finite number; "
                "its adapter or base is damaged: `dvc checkout` restores them"
            )
    return sums


def computed(rows: datasets.Dataset, at_once: int, shared_prompts: bool) -> np.ndarray:
    """Tokens that each pair is computed as, (pairs,), `at_once` in a batch; padded without shared prompts."""
    sizes = lengths(rows, shared_prompts)
    return sizes if shared_prompts else np.repeat(sizes.reshape(-1, at_once).max(axis=1), at_once)


def lengths(rows: datasets.Dataset, shared_prompts: bool) -> np.ndarray:
    """Tokens of each pair, (pairs,)."""
    table = rows.with_format("arrow")[:]
    prompt, chosen, rejected = (pc.list_value_length(table[column]).to_numpy() for column in COLUMNS)
    return length(prompt, chosen, rejected, shared_prompts)


def length(prompt: T, chosen: T, rejected: T, shared_prompts: bool) -> T:
    """Tokens of a pair: one row as `one_row` makes it, or TRL's two rows, padded to one length."""
    return prompt + chosen + 1 + rejected if shared_prompts else 2 * (prompt + np.maximum(chosen, rejected))


def can_share_prompts(config: PreTrainedConfig) -> bool:
    """Whether a model's config allows it. A mixture of experts does not: its router's loss counts tokens."""
    return can_attend_by_segment(config) and not hasattr(config, "output_router_logits")


def share_prompts(policy: Policy) -> bool:
    """Have TRL's fused LM head, which the policy has, compute each prompt once; False if the model cannot."""
    model = bare(policy)
    with measuring(policy):
        if not can_share_prompts(model.config.get_text_config()) or not attend_by_segment(model):
            return False
    fused = model.forward

    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return fused(input_ids, *args, **kwargs)
        return forward_pairs(fused, input_ids, kwargs["attention_mask"], kwargs["labels"])

    model.forward = types.MethodType(forward, model)
    return True


def forward_pairs(
    fused: Forward, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> FusedCausalLMOutput:
    """What `fused` returns for TRL's rows, computed as the one row of `one_row`.

    Args:
        fused: forward of a model with TRL's fused LM head and attention by segment.
        input_ids, attention_mask, labels: (2 × pairs, tokens), padded on the right; labels are IGNORED
            outside of the answers.
    """
    count = len(input_ids) // 2
    prompts = (labels[:count] != IGNORED).int().argmax(dim=1)
    chosen, rejected = attention_mask.sum(dim=1).split(count)
    ids, following, positions = one_row(input_ids, labels, torch.stack([prompts, chosen, rejected], dim=1))
    outputs = fused(
        ids, attention_mask=None, position_ids=positions, shift_labels=following, fused_lm_head=True
    )
    # the row's position that predicts the token after each column of TRL's rows, (2 × pairs, tokens - 1)
    sizes = chosen + rejected - prompts + 1
    begin = sizes.cumsum(0) - sizes
    column = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)[None]
    wanted = labels[:, 1:] != IGNORED
    position = torch.cat(
        [begin[:, None] + column, (begin + chosen - prompts + 1)[:, None] + column]
    ).masked_fill(~wanted, 0)

    def in_rows(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return values[0].index_select(0, position.flatten()).view_as(position).masked_fill(~wanted, 0)

    return FusedCausalLMOutput(**{name: in_rows(getattr(outputs, name)) for name in PER_TOKEN})


def one_row(
    input_ids: torch.Tensor, labels: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, the label that each predicts, and positions, (1, tokens) each, of all pairs without padding.

    A pair is [prompt, chosen, the prompt's last token, rejected]. That token is repeated because the first
    token of both answers is predicted from it; its position makes `rejected` a continuation of the prompt.

    Args:
        ends: (pairs, 3): tokens of the prompt, of prompt and chosen, and of prompt and rejected.
    """
    ids, following, positions = [], [], []
    for number, (prompt, *stops) in enumerate(ends.tolist()):
        for row, start, stop in zip((number, len(ends) + number), (0, prompt - 1), stops, strict=True):
            ids.append(input_ids[row, start:stop])
            # the last token of an answer predicts nothing
            following.append(torch.nn.functional.pad(labels[row, start + 1 : stop], (0, 1), value=IGNORED))
            positions.append(torch.arange(start, stop, device=input_ids.device))
    return torch.cat(ids)[None], torch.cat(following)[None], torch.cat(positions)[None]
