"""Run both sides of a measurement, each in a process of its own, one after the other."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent


def measured(module: str, arguments: list[str], folder: Path) -> dict:
    """Run `python -m module arguments`, which prints a JSON object as its last line; adds `peak_mib`.

    That is the largest sum over the process and its children of what they hold in memory, shared pages
    counted once.
    """
    environment = os.environ | {"HF_HOME": str(folder / "home"), "TMPDIR": str(folder)}
    with (folder / "stderr").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        peak = [0]
        watcher = threading.Thread(target=watch, args=(process, peak))
        watcher.start()
        output = process.communicate()[0]
        watcher.join()
    if process.returncode:
        sys.exit(f"{module} {' '.join(arguments)} failed:\n{(folder / 'stderr').read_text()[-3000:]}")
    return json.loads(output.splitlines()[-1]) | {"peak_mib": peak[0] / 2**20}


def watch(process: subprocess.Popen, peak: list[int]) -> None:
    """Keep the peak memory of a process and its children.

    Counting shared pages takes a core for 0.05 s at 1.4 GiB, so it is done only at a new peak, a hundredth
    above the last.
    """
    root, most = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            members = [root, *root.children(recursive=True)]
            held = sum(member.memory_info().rss for member in members)
            if held > 1.01 * most:
                most = held
                peak[0] = max(peak[0], sum(member.memory_full_info().pss for member in members))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.25)
