"""Decide how a training stage runs: in this process, or on every GPU of every node under `accelerate launch` with DeepSpeed.

The number of devices is found, not configured; beyond rounding and the draw of dropout it changes no result. `REPROTUNE_PROCESSES=2` splits a run on a
machine without GPUs over as many processes. In a Slurm job of several nodes, the stage runs on all of them.
"""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from stages import InputError, end_with_parent
from stages.provenance import LAUNCHED

PATIENCE = 900
"""Seconds that processes which are asked to end have for the step under way and a checkpoint."""


def processes() -> int:
    """How many processes share the training: one a GPU, and one without."""
    import torch

    found = os.environ.get("REPROTUNE_PROCESSES", "1")
    if not found.isdecimal() or int(found) < 1:
        raise InputError(f"REPROTUNE_PROCESSES: found {found!r}, expected a number of processes; correct or unset it")
    return torch.cuda.device_count() or int(found)


def nodes() -> int:
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def config(folder: Path, quantization: str) -> Path:
    """ZeRO-2 for a quantized base, whose weights cannot lie in parts on several devices, and ZeRO-3 for others."""
    return folder / ("zero2.yaml" if quantization == "nf4" else "zero3.yaml")


def relaunched(module: str, config: Path) -> bool:
    """Run `module` with this process's arguments on all devices and return True; False if this process is to do the work."""
    count = processes() * nodes()
    if count == 1 or LAUNCHED in os.environ:
        return False
    print(f"{module}: {count} processes on {nodes()} nodes under accelerate and DeepSpeed ({config})", flush=True)
    launcher = on_all_nodes() if nodes() > 1 else [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launcher, "--config_file", str(config), "--num_processes", str(count), "--module", module, *sys.argv[1:]]
    # asked to end, torch's launcher gives its processes this long to save
    environment = os.environ | {LAUNCHED: "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE)}
    process = subprocess.Popen(command, env=environment, preexec_fn=partial(end_with_parent, os.getpid()))
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: process.send_signal(signal.SIGTERM))
    if status := process.wait():
        sys.exit(status)
    return True


def on_all_nodes() -> list[str]:
    """The launcher once on each node of the Slurm job, which is told its number; they meet at the first, where this process runs."""
    first = scontrol("hostnames").split()[0]
    address = re.search(r"NodeAddr=(\S+)", scontrol("node", first))[1]
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    srun = ["srun", f"--nodes={nodes()}", "--ntasks-per-node=1", f"--cpus-per-task={os.environ.get('SLURM_CPUS_ON_NODE', '1')}", "--kill-on-bad-exit=1"]
    node = ["bash", "-c", 'exec "$0" -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" "$@"', sys.executable]
    return [*srun, *node, "--num_machines", str(nodes()), "--main_process_ip", address, "--main_process_port", str(port)]


def scontrol(*what: str) -> str:
    found = subprocess.run(["scontrol", "--oneliner", "show", *what], capture_output=True, text=True)
    if found.returncode:
        raise InputError(f"SLURM_JOB_NUM_NODES is {nodes()}, and `scontrol show {' '.join(what)}` failed: {found.stderr.strip()}; run inside of a Slurm job")
    return found.stdout


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if LAUNCHED in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if LAUNCHED in os.environ else 0


def is_main() -> bool:
    """True in the one process that writes outs."""
    return rank() == 0


def join() -> None:
    """Meet the other processes; trainers do so by themselves."""
    if LAUNCHED in os.environ:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
