"""A sandbox for code that a model wrote, by bubblewrap.

A program has no network, processes of its own, a read-only file system, and limits on time, memory and disk.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from reprotune.errors import InputError

SECONDS = 10
MEMORY = 2 * 2**30
"""Bytes of address space."""
FILE = 2**24
"""Bytes of the largest file."""
PROCESSES = 64
DISK = 2**26
"""Bytes of each writable folder; they lie in memory."""
PASSED = 77
"""Exit status of a program that ran to its end: one that exits before its tests has another."""
HIDDEN = ("/dev/shm", "/tmp", "/var/tmp", "/run", "/mnt", "/home", "/root")
"""Folders that a program finds empty and can write to; so are its home, temporary and working folder."""


def check() -> None:
    """Raise InputError if code cannot be run safely here."""
    if shutil.which("bwrap") is None:
        reason = "is not installed"
    else:
        finished = run("pass", subprocess.PIPE)
        if finished.returncode == PASSED:
            return
        reason = f"fails: {finished.stderr.decode(errors='replace').strip()}"
    raise InputError(
        f"params.yaml: benchmarks.*.run_code: code is run by bubblewrap, and `bwrap` {reason}; install it "
        "(Debian: bubblewrap), or take the benchmark out of evaluate.benchmarks"
    )


def passes(program: str) -> bool:
    """Whether this Python program runs to its end without an error, within the limits."""
    try:
        return run(program).returncode == PASSED
    except subprocess.TimeoutExpired:
        return False


def run(program: str, stderr: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(),
        input=program.encode(),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        timeout=SECONDS,
        preexec_fn=limit,
    )


def command() -> list[str]:
    """Run a Python program from standard input in the sandbox."""
    isolated = ("--unshare-all", "--die-with-parent", "--new-session", "--clearenv")
    words = ["bwrap", *isolated, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    hidden = (*HIDDEN, str(Path.home()), tempfile.gettempdir(), os.getcwd())
    for folder in dict.fromkeys(folder for folder in hidden if Path(folder).is_dir()):
        words += ["--size", str(DISK), "--tmpfs", folder]
    for folder in sorted({sys.prefix, sys.base_prefix}):
        words += ["--ro-bind", folder, folder]
    # limited in here: bwrap's namespace counts its own processes
    run_program = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_NPROC, ({PROCESSES}, {PROCESSES})); "
        "exec(compile(sys.stdin.read(), 'program', 'exec'), {'__name__': '__main__'}); "
        f"os._exit({PASSED})"
    )
    return [*words, "--chdir", "/tmp", sys.executable, "-I", "-c", run_program]


def limit() -> None:
    """Set the limits that a child process inherits."""
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """HumanEval's metric in lm-eval's form: whether the completed function passes its tests."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})"
    return {"pass@1": float(passes(program))}
