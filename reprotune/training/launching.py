"""Start a training stage again under `accelerate launch` and DeepSpeed where there are several devices.

Their number is found, not configured, and changes no result beyond rounding and the draws of dropout.
"""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from reprotune.errors import InputError
from reprotune.process import LAUNCHED, end_with_parent

PATIENCE = 900
"""Seconds that a launcher waits for its processes after SIGTERM; more than their own `stopping.GRACE`."""


def processes() -> int:
    """Training processes on this node: one a GPU; without GPUs REPROTUNE_PROCESSES, by default one."""
    import torch

    value = os.environ.get("REPROTUNE_PROCESSES", "1")
    if not value.isdecimal() or int(value) < 1:
        raise InputError(
            f"REPROTUNE_PROCESSES: found {value!r}, expected a number of processes; correct or unset it"
        )
    return torch.cuda.device_count() or int(value)


def nodes() -> int:
    """Nodes of this Slurm job; 1 outside of Slurm."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def config(folder: Path, quantization: str) -> Path:
    """The accelerate config: ZeRO-2 for a quantized base, which cannot be sharded, otherwise ZeRO-3."""
    return folder / ("zero2.yaml" if quantization == "nf4" else "zero3.yaml")


def relaunched(module: str, config_file: Path) -> bool:
    """Run `module` with this process's arguments on all devices, and return True once it has ended.

    Returns False if this process is to do the work: there is one device, or a launcher started it.
    """
    count = processes() * nodes()
    if count == 1 or LAUNCHED in os.environ:
        return False
    print(
        f"{module}: {count} processes on {nodes()} nodes under accelerate and DeepSpeed ({config_file})",
        flush=True,
    )
    launcher = on_all_nodes() if nodes() > 1 else [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", str(config_file), "--num_processes", str(count), "--module", module]
    environment = os.environ | {LAUNCHED: "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE)}
    process = subprocess.Popen(
        [*launcher, *options, *sys.argv[1:]],
        env=environment,
        preexec_fn=partial(end_with_parent, os.getpid()),
    )
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: process.send_signal(signal.SIGTERM))
    if status := process.wait():
        sys.exit(status)
    return True


def on_all_nodes() -> list[str]:
    """The command that starts a launcher on each node of the Slurm job; they meet at the first, this one."""
    first = scontrol("hostnames").split()[0]
    address = re.findall(r"NodeAddr=(\S+)", scontrol("node", first))[0]
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    cpus = os.environ.get("SLURM_CPUS_ON_NODE", "1")
    script = 'exec "$0" -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" "$@"'
    return [
        *(
            "srun",
            f"--nodes={nodes()}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={cpus}",
            "--kill-on-bad-exit=1",
        ),
        *("bash", "-c", script, sys.executable),
        *("--num_machines", str(nodes())),
        *("--main_process_ip", address, "--main_process_port", str(port)),
    ]


def scontrol(*query: str) -> str:
    """What `scontrol show` prints.

    Raises:
        InputError: it fails.
    """
    shown = subprocess.run(["scontrol", "--oneliner", "show", *query], capture_output=True, text=True)
    if shown.returncode:
        raise InputError(
            f"SLURM_JOB_NUM_NODES: found {nodes()}, but `scontrol show {' '.join(query)}` failed: "
            f"{shown.stderr.strip()}; run inside of a Slurm job"
        )
    return shown.stdout
