"""Same seed, same bytes: seeds, repeatable kernels, and the device of this process."""

import os

import torch
from transformers import set_seed

from reprotune.compat.torch import (
    avoid_cudnn_attention,
    keep_freed_memory,
    leave_new_memory_unfilled,
    use_repeatable_kernels,
)


def start(seed: int, warn_only: bool = False) -> None:
    """Seed every generator and choose repeatable kernels.

    Args:
        warn_only: warn instead of raising where torch has no repeatable kernel; for stages without gradients.
    """
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    set_seed(seed)
    use_repeatable_kernels(warn_only)
    leave_new_memory_unfilled()
    avoid_cudnn_attention()


def device() -> torch.device:
    """This process's own GPU under a launcher, else the first one; the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
