"""Decide how a training stage runs: in this process, or on every GPU under `accelerate launch` with DeepSpeed.

The number of devices is found, not configured; beyond rounding and the draw of dropout it changes no result. `REPROTUNE_PROCESSES=2` splits a run on a
machine without GPUs over as many processes.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from stages import InputError, end_with_parent

LAUNCHED = "REPROTUNE_LAUNCHED"
"""Set in the processes that the launcher starts, so that they do the work."""


def processes() -> int:
    """How many processes share the training: one a GPU, and one without."""
    import torch

    found = os.environ.get("REPROTUNE_PROCESSES", "1")
    if not found.isdecimal() or int(found) < 1:
        raise InputError(f"REPROTUNE_PROCESSES: found {found!r}, expected a number of processes; correct or unset it")
    return torch.cuda.device_count() or int(found)


def relaunched(module: str, config: Path) -> bool:
    """Run `module` with this process's arguments on all devices and return True; False if this process is to do the work."""
    count = processes()
    if count == 1 or LAUNCHED in os.environ:
        return False
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(count)]
    print(f"{module}: {count} processes under accelerate and DeepSpeed ({config})", flush=True)
    command = [*launcher, "--module", module, *sys.argv[1:]]
    status = subprocess.run(command, env=os.environ | {LAUNCHED: "1"}, preexec_fn=partial(end_with_parent, os.getpid())).returncode
    if status:
        sys.exit(status)
    return True


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if LAUNCHED in os.environ else 1


def is_main() -> bool:
    """True in the one process that writes outs."""
    return LAUNCHED not in os.environ or os.environ["RANK"] == "0"
