"""Run code that a model wrote, where it can do no harm: bubblewrap gives it no network, processes of its own, and a file system that is read-only, with small empty
folders in place of the temporary ones, home folders and this one; time, memory, processes and the size of files are limited.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from stages import InputError

SECONDS = 10
MEMORY = 2 * 2**30
"""Bytes of address space."""
FILE = 2**24
PROCESSES = 64
DISK = 2**26
"""Bytes of each folder that can be written to, which lie in memory."""
PASSED = 77
"""The exit status behind the last line, for a program may exit before its tests."""


def check() -> None:
    """Raises InputError where code cannot be run safely."""
    found = started("pass", subprocess.PIPE)
    if found is None or found.returncode != PASSED:
        reason = "is not there" if found is None else f"fails: {found.stderr.decode(errors='replace').strip()}"
        raise InputError(f"params.yaml: benchmarks.*.run_code: code is run by bubblewrap, and `bwrap` {reason}; install it (Debian: bubblewrap), or take the benchmark out of evaluate.benchmarks")


def passes(program: str) -> bool:
    """Whether this Python program runs to its last line, without an error."""
    try:
        return started(program).returncode == PASSED
    except subprocess.TimeoutExpired:
        return False


def started(program: str, stderr: int = subprocess.DEVNULL) -> subprocess.CompletedProcess | None:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return None
    python = sorted({sys.prefix, sys.base_prefix})
    hidden = [folder for folder in ("/dev/shm", "/tmp", "/var/tmp", "/run", "/mnt", "/home", "/root", str(Path.home()), tempfile.gettempdir(), os.getcwd()) if Path(folder).is_dir()]
    command = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    for folder in dict.fromkeys(hidden):
        command += ["--size", str(DISK), "--tmpfs", folder]
    for folder in python:
        command += ["--ro-bind", folder, folder]
    # counted within the namespace that bwrap makes
    begin = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NPROC, ({PROCESSES}, {PROCESSES})); exec(compile(sys.stdin.read(), 'program', 'exec'), {{'__name__': '__main__'}}); os._exit({PASSED})"
    command += ["--chdir", "/tmp", sys.executable, "-I", "-c", begin]
    return subprocess.run(command, input=program.encode(), stdout=subprocess.DEVNULL, stderr=stderr, timeout=SECONDS, preexec_fn=limit)


def limit() -> None:
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_FSIZE, FILE), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Of HumanEval: whether its function, as it was completed, passes its test."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})"
    return {"pass@1": float(passes(program))}
