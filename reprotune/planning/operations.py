"""Counts what a model computes, operation by operation: FLOPs, kernels and live bytes."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

aten = torch.ops.aten
MATRICES = flop_registry | {
    # the fused LM head's backward pass adds into its result
    aten.addmm_: shape_wrapper(lambda into, left, right, **_: 2 * left[0] * left[1] * right[1]),
}
"""FLOPs by operation, from the shapes of its arguments."""
ATTENTION = {
    # only eager attention multiplies batches of matrices
    aten.bmm: flop_registry[aten.bmm],
    # torch registers only the attention kernels of GPUs
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}
"""FLOPs of attention, by operation."""


class Counter(TorchDispatchMode):
    """Counts operations that allocate a tensor, FLOPs, and the bytes of live tensors other than `known`.

    torch's own FlopCounterMode also follows modules, and so keeps alive what gradient checkpointing frees.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.bytes, self.peak, self.operations, self.matrices, self.attention = 0, 0, 0, 0, 0
        self.alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        allocates = False
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.finalize(storage, self.free, key, size)
                self.bytes += size
                allocates = True
        self.peak = max(self.peak, self.bytes)
        self.operations += allocates
        operation = function._overloadpacket
        if operation in ATTENTION:
            self.attention += ATTENTION[operation](*args, **kwargs, out_val=result)
        elif operation in MATRICES:
            self.matrices += MATRICES[operation](*args, **kwargs, out_val=result)
        return result

    def free(self, key: int, size: int) -> None:
        self.bytes -= size
        del self.alive[key]

    def peak_since(self) -> int:
        """The most live bytes since the last call."""
        peak, self.peak = self.peak, self.bytes
        return peak
