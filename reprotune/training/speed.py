"""Speed, memory and devices of a training run, which differ from run to run and belong to no out."""

import platform
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from reprotune.compat import trl
from reprotune.model.policies import Policy, bare
from reprotune.records import write_csv, write_json
from reprotune.training import distributed

PROBE = 2048
"""Rows and columns of the matrices whose product a CPU is measured by."""


def write_measured(measured: Path, stage: str, rows: list[dict[str, float]]) -> None:
    """Write the speed of each step, and the devices."""
    write_csv(measured / f"{stage}_speed.csv", rows, list(rows[0]))
    write_json(measured / f"{stage}.json", {"devices": devices(), "python": platform.python_version()})


def by_step(
    tokens: Sequence[int], records: Mapping[str, list[float]], flops_per_token: float | None, dtype: str
) -> list[dict[str, float]]:
    """A row for each step: seconds, tokens a second, peak memory in MiB, and MFU in percent where known.

    Args:
        tokens: tokens that each step computed.
        records: `seconds` and `memory_mib` of each step.
    """
    peak = device_flops(dtype)
    rows: list[dict[str, float]] = []
    for step, (count, seconds, memory) in enumerate(
        zip(tokens, records["seconds"], records["memory_mib"], strict=True), start=1
    ):
        rate = count / seconds
        row = {
            "step": step,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(rate, 1),
            "memory_mib": round(memory),
        }
        if peak is not None and flops_per_token is not None:
            row["mfu"] = round(100 * flops_per_token * rate / (distributed.world_size() * peak), 2)
        rows.append(row)
    return rows


def flops_per_token(policy: Policy, length: float) -> float | None:
    """FLOPs a token of a training step on examples of `length` tokens; None where TRL cannot count them.

    TRL counts all weights as trained. With an adapter a third falls away: gradients of the base's weights.
    """
    full = trl.flops_per_token(bare(policy).config.get_text_config(), round(length))
    return full if full is None or bare(policy) is policy else full * 2 / 3


def peak_memory() -> float:
    """The most MiB that this process has used so far: of GPU memory, or of main memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def devices() -> list[str]:
    """The name of each process's device, taken to be the same on all."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        models = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        name = f"{torch.get_num_threads()} cores of {models[0] if models else platform.machine()}"
    return [name] * distributed.world_size()


def device_flops(dtype: str) -> float | None:
    """Peak FLOP/s of one device: of a GPU by its data sheet, of a CPU by a float32 matrix product run now."""
    if torch.cuda.is_available():
        return trl.peak_flops(torch.cuda.get_device_name(), dtype)
    matrix = torch.ones(PROBE, PROBE)
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        matrix @ matrix
        seconds.append(time.monotonic() - start)
    return 2 * PROBE**3 / min(seconds)
