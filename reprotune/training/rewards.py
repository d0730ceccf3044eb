"""Rewards of DPO (https://arxiv.org/abs/2305.18290): beta times the log-ratio to the cached reference."""

import argparse

import datasets
import torch

from reprotune import params
from reprotune.errors import InputError
from reprotune.model.policies import Policy
from reprotune.training import pairs

START_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Largest `difference` before the first step, by model.dtype, in nats for an answer of one token."""


def rewards(
    policy: Policy, rows: datasets.Dataset, pad_token_id: int, settings: params.Params, label: str
) -> dict[str, float]:
    """Means over pairs, whatever `dpo.loss` trains on.

    Returns:
        margin: reward of the chosen answer minus reward of the rejected one.
        accuracy: share of pairs with a positive margin; a tie counts half.
        sigmoid_loss: -log σ(margin), the loss of the DPO paper, without label smoothing.
        chosen, rejected: log-probs of the answers, in nats.
        difference: the largest absolute log-ratio, divided by the square root of the answer's tokens because
            rounding errors grow with it. A maximum, not a mean.
        pairs: their number.
    """
    log_probs = pairs.log_probs(policy, rows, pad_token_id, settings.reference.batch_size, label)
    chosen, rejected = (
        torch.tensor(log_probs[answer], dtype=torch.float64)
        - torch.tensor(rows[pairs.REFERENCE[answer]], dtype=torch.float64)
        for answer in pairs.ANSWERS
    )
    tokens = torch.tensor([len(ids) for answer in pairs.ANSWERS for ids in rows[f"{answer}_ids"]])
    margins = settings.dpo.beta * (chosen - rejected)
    return {
        "difference": float((torch.cat([chosen, rejected]).abs() / tokens.sqrt()).max()),
        "margin": float(margins.mean()),
        "accuracy": float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean()),
        "sigmoid_loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "chosen": sum(log_probs["chosen"]) / len(rows),
        "rejected": sum(log_probs["rejected"]) / len(rows),
        "pairs": len(rows),
    }


def check_start(difference: float, dtype: str, paths: argparse.Namespace) -> None:
    """Check that the policy before the first step is the reference.

    Raises:
        InputError: it differs by more than rounding.
    """
    if not difference <= START_TOLERANCE[dtype]:
        raise InputError(
            f"{paths.reference}: before the first step the policy ({paths.adapter}) differs from the cached "
            f"reference by {difference:.3g} nats, divided by the square root of an answer's tokens; "
            f"expected at most {START_TOLERANCE[dtype]}; `dvc repro --force reference` computes it anew"
        )
