"""Run the stale cells of `evaluate` side by side: one a GPU, or several on the cores of a machine without.

Each cell is a `dvc repro --single-item` of its own, so it leaves what `dvc repro` leaves, dvc.lock included.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from io import BufferedReader
from itertools import takewhile
from pathlib import Path
from typing import cast

import psutil
from dvc.utils.serialize import modify_yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from reprotune import params_file
from reprotune.dvc_lock import LOCK, read_stages
from reprotune.errors import InputError
from reprotune.process import end_with_parent
from reprotune.training import launching

LOGS = Path(".dvc/tmp/cells")
DVC = [sys.executable, "-m", "dvc"]


def planned(*options: str) -> list[str]:
    """The stages that `dvc repro evaluate` would run, in its order, as far as it can know beforehand."""
    result = subprocess.run([*DVC, "repro", "--dry", *options, "evaluate"], capture_output=True, text=True)
    if result.returncode:
        # errors of their own if those are the reason
        params_file.load()
        read_stages()
        raise InputError(
            f"`dvc repro --dry evaluate` failed; `dvc repro dpo` makes what it needs\n{result.stderr.strip()}"
        )
    names = re.findall(r"^(?:Running stage|Stage) '(\S+)'(?::| is cached)", result.stdout, re.MULTILINE)
    # a stage whose result is in the run cache is named twice
    return list(dict.fromkeys(names))


def places(count: int) -> list[dict[str, str]]:
    """The environment of each process: its own GPU, or its share of the cores."""
    import torch

    if gpus := torch.cuda.device_count():
        if count > gpus:
            raise InputError(f"--processes: found {count}, expected at most {gpus}, one a GPU")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible[:count]]
    cores = len(os.sched_getaffinity(0))
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))}] * count


class Cells:
    """Runs cells and shows the state of each."""

    def __init__(self, cells: list[str]) -> None:
        self.waiting = deque(cells)
        self.running: dict[str, subprocess.Popen] = {}
        self.failed: list[str] = []
        self.ending = False
        self.asked: set[int] = set()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self.tasks = {
            cell: self.progress.add_task(cell, total=100, state="waiting", start=False) for cell in cells
        }
        self.terminal = Console().is_terminal
        if not self.terminal:
            self.progress.disable = True

    def work(self, environment: Mapping[str, str]) -> None:
        """Run one waiting cell after the other."""
        while not self.ending:
            try:
                cell = self.waiting.popleft()
            except IndexError:
                return
            begin = time.monotonic()
            try:
                status = self.run(cell, environment)
            finally:
                self.running.pop(cell, None)
            state = "done" if status == 0 else "ended on request" if self.ending else "failed"
            if state == "failed":
                self.failed.append(cell)
            self.say(cell, f"{state} ({time.monotonic() - begin:.0f} s)", 100 if status == 0 else None)

    def run(self, cell: str, environment: Mapping[str, str]) -> int:
        place = " ".join(f"{name}={value}" for name, value in environment.items())
        self.progress.start_task(self.tasks[cell])
        self.say(cell, f"running ({place})")
        process = subprocess.Popen(
            [*DVC, "--wait-for-lock", "repro", "--single-item", cell],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, os.getpid()),
        )
        self.running[cell] = process
        output = cast(BufferedReader, process.stdout)
        with (LOGS / f"{cell}.log").open("wb") as log:
            while part := output.read1():
                log.write(part)
                log.flush()
                # of the newest progress bar
                if percent := re.findall(rb"(\d+)%\|", part):
                    self.progress.update(self.tasks[cell], completed=int(percent[-1]))
        return process.wait()

    def say(self, cell: str, state: str, completed: int | None = None) -> None:
        self.progress.update(self.tasks[cell], state=state, completed=completed)
        if not self.terminal:
            print(f"{cell}: {state}", flush=True)

    def end(self) -> None:
        """Have running cells save and end, and waiting ones not begin.

        DVC itself gets no signal: it could be writing dvc.lock and leave half of it.
        """
        self.ending = True
        for process in list(self.running.values()):
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    if child.pid not in self.asked and "stages.evaluate" in child.cmdline():
                        child.send_signal(signal.SIGINT)
                        self.asked.add(child.pid)


def run_all(cells: list[str], environments: list[dict[str, str]]) -> Cells:
    """Run the cells, one at a time in each environment, until all have ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the running cells have saved and ended.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    state = Cells(cells)
    with state.progress, ThreadPoolExecutor(len(environments)) as pool:
        workers = [pool.submit(state.work, environment) for environment in environments]
        try:
            wait(workers)
        except KeyboardInterrupt:
            state.end()
            while wait(workers, timeout=0.1).not_done:
                # again, for a cell that was about to begin
                state.end()
            raise
    for worker in workers:
        worker.result()
    return state


def in_order() -> None:
    """Put new cells into dvc.lock in the order of `dvc repro`; they were added as they finished."""
    with modify_yaml(str(LOCK)) as lock:
        stages = lock["stages"]
        new = list(takewhile(lambda name: name.startswith("evaluate@"), reversed(stages)))
        if len(new) > 1:
            order = planned("--force")
            for cell in sorted(filter(order.__contains__, new), key=order.index):
                stages[cell] = stages.pop(cell)


def run(processes: int | None) -> None:
    """Run the stale cells side by side, after what they need.

    Args:
        processes: cells at once; None for one a GPU, or REPROTUNE_PROCESSES on a machine without.
    """
    count = launching.processes() if processes is None else processes
    if count < 1:
        raise InputError(f"--processes: found {count}, expected at least 1")
    environments = places(count)
    cells = planned()
    while before := [name for name in cells if not name.startswith("evaluate@")]:
        if subprocess.run([*DVC, "repro", *before]).returncode:
            sys.exit(f"error: what the cells need was not made: {', '.join(before)}")
        cells = planned()
    if not cells:
        print("every cell of evaluate is up to date")
        return
    begin = time.monotonic()
    print(
        f"{len(cells)} cells are stale; {min(count, len(cells))} run at once; their output is in {LOGS}",
        flush=True,
    )
    try:
        finished = run_all(cells, environments[: len(cells)])
    except KeyboardInterrupt:
        sys.exit("ended on request; the next call resumes")
    finally:
        in_order()
    for cell in finished.failed:
        tail = (LOGS / f"{cell}.log").read_text(errors="replace").strip().splitlines()[-3:]
        print(f"\n{cell} failed:\n  " + "\n  ".join(tail), file=sys.stderr)
    if finished.failed:
        names = ", ".join(finished.failed)
        sys.exit(
            f"error: {len(finished.failed)} of {len(cells)} cells failed: {names}; {LOGS} has their output"
        )
    print(f"{len(cells)} cells in {time.monotonic() - begin:.0f} s; `dvc repro` compares and reports")
