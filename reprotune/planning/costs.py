"""What a stage needs of its devices, and how FLOPs and kernel launches become seconds."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from reprotune.planning.devices import Machine
from reprotune.planning.tracing import Cost, Shape


@dataclass(frozen=True)
class Need:
    """Memory in bytes of one device, work and time over all of them."""

    stage: str
    weights: float
    """Weights that are not trained."""
    trained: float
    """Adapter, gradients and optimizer; without an adapter, gradients and optimizer."""
    activations: float
    process: float
    """Of the process before it holds a model."""
    loading: float
    """Of all weights before they are dealt out to the devices; 0 where they stay on one."""
    steps: int
    tokens: float
    flops: float
    computing: float
    """Seconds of arithmetic, and of starting the stage."""
    starting: float
    """Seconds of launching kernels one after the other."""

    @property
    def memory(self) -> float:
        return max(self.weights + self.trained + self.activations, self.loading) + self.process


class Time(NamedTuple):
    flops: float
    computing: float
    """Seconds of arithmetic at the machine's utilization."""
    starting: float
    """Seconds of launching the kernels of the micro-batches."""


def time(
    cost: Cost, shape: Shape, tokens: float, length: float, micro_batches: float, machine: Machine
) -> Time:
    """What `tokens` take when a micro-batch of this shape has this cost.

    Args:
        tokens: over all devices.
        length: tokens that one token's attention sees, on average.
        micro_batches: on one device.
    """
    share = tokens / (shape.rows * shape.length)
    flops = share * (cost.matrices + cost.attention * length * shape.examples / shape.length)
    computing = flops / (machine.flops * machine.utilization * machine.devices)
    return Time(flops, computing, micro_batches * cost.operations * machine.kind.operation)


def bytes_per_weight(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
