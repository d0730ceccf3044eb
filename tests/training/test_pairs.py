"""Pairs whose prompt is computed once have the numbers and gradients of TRL's own rows."""

import datasets
import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from reprotune.data.chat_tokens import IGNORED
from reprotune.training import pairs
from tests.tiny import make_policy

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def batch(lengths: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """Random pairs as TRL lays them out.

    Args:
        lengths: of prompt, chosen and rejected.
    """
    draw = torch.Generator().manual_seed(1)
    rows = [
        dict(
            zip(
                ("prompt_ids", "chosen_ids", "rejected_ids"),
                (torch.randint(3, 250, (n,), generator=draw).tolist() for n in row),
                strict=True,
            )
        )
        for row in lengths
    ]
    collated = DataCollatorForPreference(0)(rows)
    labels = collated["input_ids"].masked_fill(collated.pop("completion_mask") == 0, IGNORED)
    return {**collated, "labels": labels}


@pytest.mark.parametrize(("architecture", "window"), [("qwen3", None), ("llama", None), ("gemma3", 6)])
@pytest.mark.parametrize(
    "lengths", [[(5, 3, 9)], [(1, 1, 1)], [(12, 4, 2), (3, 8, 20), (30, 1, 1), (2, 9, 9)]]
)
def test_shared_prompts_give_what_separate_ones_do(architecture, window, lengths):
    model = make_policy(architecture, "sdpa", window=window)
    add_fused_lm_head(model, outputs=OUTPUTS)
    inputs, runs = batch(lengths), []
    for shared in (False, True):
        assert not shared or pairs.share_prompts(model)
        model.zero_grad()
        outputs = model(**inputs, fused_lm_head=True)
        (outputs.log_probs * torch.linspace(1, 2, outputs.log_probs.shape[1])).sum().backward()
        runs.append((outputs, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (separate, gradients), (shared, shared_gradients) = runs
    assert (separate.log_probs != 0).sum() == sum(chosen + rejected for _, chosen, rejected in lengths)
    for name in pairs.PER_TOKEN:
        torch.testing.assert_close(getattr(shared, name), getattr(separate, name), rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_fewer_tokens_are_computed():
    model = make_policy("qwen3", "sdpa")
    add_fused_lm_head(model)
    tokens = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: tokens.append(args[0].numel())
    )
    inputs = batch([(40, 10, 12)])
    model(**inputs, fused_lm_head=True)
    pairs.share_prompts(model)
    model(**inputs, fused_lm_head=True)
    assert (tokens[0], tokens[-1]) == (2 * 52, 40 + 10 + 1 + 12)


def test_computed_tokens_are_counted():
    rows = datasets.Dataset.from_list(
        [
            {"prompt_ids": [1] * 40, "chosen_ids": [2] * 10, "rejected_ids": [3] * 12},
            {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4]},
        ]
    )
    assert pairs.lengths(rows, True).tolist() == [40 + 10 + 1 + 12, 5]
    assert pairs.lengths(rows.select([1, 0]), False).tolist() == [2 * 3, 2 * (40 + 12)]


def test_other_attentions_keep_rows_apart():
    model = make_policy("qwen3", "eager")
    add_fused_lm_head(model)
    assert not pairs.share_prompts(model)
    assert (model(**batch([(5, 3, 9)]), fused_lm_head=True).log_probs != 0).sum() == 12
    model = make_policy("qwen3", "sdpa")
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert not pairs.share_prompts(model)
