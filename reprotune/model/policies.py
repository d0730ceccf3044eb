"""Policy: the model that is trained and scored, with or without an adapter, and how it computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel

Policy: TypeAlias = PreTrainedModel | PeftModel
"""A base model with an adapter on it, or one whose weights are all trained."""


def bare(policy: Policy) -> PreTrainedModel:
    """The transformers model below PEFT's wrapper."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def compute_in(policy: Policy, dtype: str) -> None:
    """Have the model compute in `dtype` under every trainer and launcher.

    With bfloat16, float32 weights stay as they are and are rounded where they are used. DeepSpeed and
    accelerate have settings of their own for this; DeepSpeed's rounds the weights of an adapter.
    """
    model = bare(policy)
    forward = model.forward

    @wraps(forward)
    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return forward(*args, **kwargs)

    model.forward = autocast_forward


@contextmanager
def measuring(policy: Policy) -> Iterator[None]:
    """No gradients and no dropout inside a `with` block."""
    training = policy.training
    policy.eval()
    with torch.no_grad():
        yield
    policy.train(training)
