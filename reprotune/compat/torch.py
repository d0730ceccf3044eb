"""torch: repeatable kernels, memory that is neither filled nor given back, and small matrix products."""

import ctypes
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def use_repeatable_kernels(warn_only: bool) -> None:
    """Have torch choose kernels that give the same bytes on every run, or raise where it has none.

    transformers reads FLASH_ATTENTION_DETERMINISTIC for the package flash-attn, of which torch does not know.
    Seen with torch 2.13.0 and transformers 5.23.0.

    Args:
        warn_only: warn instead of raising, for stages that compute no gradients: a benchmark may sample, and
            torch has no repeatable kernel for that.
    """
    torch.set_deterministic_debug_mode("warn" if warn_only else "error")
    torch.backends.cudnn.benchmark = False
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")


def leave_new_memory_unfilled() -> None:
    """Do not fill new tensors with NaN in deterministic mode.

    Every tensor is written before it is read, so filling changes no result; it slows scoring and training
    (https://github.com/pytorch/pytorch/issues/117081). Seen with torch 2.13.0.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False


def avoid_cudnn_attention() -> None:
    """Do not let cuDNN compute attention.

    It builds a new plan for every length, which takes as long as the rest of a training step
    (https://github.com/modelscope/FunASR/issues/3704), and its backward pass is not repeatable
    (https://github.com/pytorch/pytorch/pull/182551). Seen with torch 2.11.0+cu130 on an H200.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of returning it to the kernel after each large tensor.

    On a CPU, every such tensor would be paged in anew: a third of a forward pass on a virtual machine. The
    constants are M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX of mallopt(3). Seen with torch 2.13.0.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
            libc.mallopt(option, value)


class TransposedLinear(TorchFunctionMode):
    """Inside a `with` block, float32 linear layers compute (W·xᵀ)ᵀ instead of x·Wᵀ.

    The products are the same, and MKL computes them faster for few tokens. Seen with torch 2.13.0+cpu.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            function is linear
            and not kwargs
            and args[0].dtype == torch.float32
            and args[0].dim() > 1
            and type(args[1]) is torch.nn.Parameter
        ):
            # an expert router passes no bias, not even None
            tokens, weight, bias = (*args, None)[:3]
            products = torch.mm(weight, tokens.flatten(0, -2).t()).t()
            products = products.contiguous().unflatten(0, tokens.shape[:-1])
            return products if bias is None else products + bias
        return function(*args, **(kwargs or {}))
