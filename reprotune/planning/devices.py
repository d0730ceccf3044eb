"""The devices that a run is planned for: named, or those of this machine."""

import math
import os
import re
from dataclasses import dataclass

import torch

from reprotune.compat import trl
from reprotune.errors import InputError
from reprotune.model import loading
from reprotune.training import speed

GIB = 2**30


@dataclass(frozen=True)
class Kind:
    """What GPUs or CPUs take beyond the tensors and FLOPs that are counted."""

    process: float
    """Bytes of a process before it holds a model."""
    start: float
    """Seconds until a stage computes: importing libraries, loading the model."""
    operation: float
    """Seconds of launching a kernel, with the Python around it."""
    held: float
    """Bytes that the allocator holds for each byte of live activations."""
    utilization: float
    """Share of the peak FLOP/s that is reached, unless it is given."""


GPU = Kind(process=0.6 * GIB, start=30, operation=4e-5, held=1.0, utilization=0.4)
"""`operation` was measured on one H200; `utilization` is an assumption."""
CPU = Kind(process=0.65 * GIB, start=7.5, operation=0, held=1.55, utilization=0.6)
"""Measured by `python -m perf.preflight` on two cores."""


@dataclass(frozen=True)
class Machine:
    name: str
    devices: int
    memory: float
    """Bytes of one device."""
    flops: float
    """Peak FLOP/s of one device in model.dtype; nan if unknown."""
    gpu: bool
    utilization: float
    """Share of `flops` that a run reaches."""

    @property
    def kind(self) -> Kind:
        return GPU if self.gpu else CPU

    @property
    def reached_flops(self) -> float:
        """FLOP/s that one device reaches."""
        return self.flops * self.utilization


def machine(gpu: str | None, gpus: int | None, utilization: float | None, dtype: str) -> Machine:
    """The devices that `--gpu`, `--gpus` and `--utilization` ask for; without `gpu`, those found here.

    Raises:
        InputError: `gpu` is not a name and a memory size, or `gpus` asks for GPUs of a machine without.
    """
    count = gpus or 1
    flops: float | None
    if gpu is not None:
        name, (memory, flops) = gpu, named_gpu(gpu, dtype)
    elif torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        flops, count = trl.peak_flops(name, dtype), gpus or torch.cuda.device_count()
    elif gpus:
        raise InputError("--gpus: there is no GPU here; name the kind with --gpu, such as --gpu h100-80gb")
    else:
        name, memory = f"{os.cpu_count()} CPU cores", loading.physical_memory()
        flops = speed.device_flops(dtype)
    if flops is None:
        known = ", ".join(trl.known_devices(dtype)) or "none in this model.dtype"
        print(f"{name}: its speed in {dtype} is not known, and so no hours are; known are {known}\n")
    on_gpu = gpu is not None or torch.cuda.is_available()
    share = utilization or (GPU if on_gpu else CPU).utilization
    return Machine(name, count, memory, math.nan if flops is None else flops, on_gpu, share)


def named_gpu(name: str, dtype: str) -> tuple[float, float | None]:
    """Usable bytes, and peak FLOP/s if known, of a GPU by its name and memory, such as h100-80gb."""
    parts = re.fullmatch(r"(.+)-(\d+)gb", name.lower())
    if parts is None:
        raise InputError(f"--gpu: found {name!r}, expected a name and its memory, such as h100-80gb")
    # a driver leaves 99% of the nominal size; GDDR memory also gives a sixteenth to error correction
    share = 15 / 16 if re.match(r"(t4|l4|l40|l40s|a10|a10g|a40)\b", parts[1]) else 0.99
    return share * int(parts[2]) * GIB, trl.peak_flops(parts[1].replace("-", " "), dtype)
