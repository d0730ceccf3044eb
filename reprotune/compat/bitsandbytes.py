"""bitsandbytes: NF4 layers that stay differentiable on a CPU."""

import torch
from bitsandbytes.nn import Linear4bit


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keep NF4 layers on the kernels that have a backward pass.

    On a CPU with AVX512-BF16, the first forward pass in eval mode would repack the weights for a fused
    kernel, which rounds to bfloat16 and passes no gradient on
    (https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804). Seen with bitsandbytes 0.50.2.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
