"""How a command runs as a process: errors become one message, and a child process ends with its parent."""

import argparse
import ctypes
import gc
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NoReturn

from reprotune.errors import InputError, disk_full, first_line

# Read before a stage imports what is slow: its parent may be gone by then.
PARENT_OF = {os.getpid(): os.getppid()}
LAUNCHED = "REPROTUNE_LAUNCHED"
"""Set in the environment of processes that `accelerate launch` started for a stage."""

_at_success: list[Callable[[], None]] | None = None
"""What `at_success` collected; None while no command runs."""


def command(main: Callable[[], None], watched: AbstractContextManager[None] | None = None) -> None:
    """Run `main` inside `watched`.

    Bad input and a full disk end in one message and exit code 1; a bug keeps its traceback.
    """
    global _at_success
    gc.freeze()
    gc.enable()
    warnings.simplefilter("ignore", FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show ± costs no stage its work
            stream.reconfigure(errors="replace")
    _at_success = []
    try:
        with watched or nullcontext():
            main()
        for action in _at_success:
            action()
        if LAUNCHED in os.environ:
            leave()
    except InputError as error:
        sys.exit(f"error: {error}")
    except FileNotFoundError as error:
        sys.exit(
            f"error: {error.filename or error}: no such file; "
            "`dvc checkout` restores it, `dvc repro` makes it anew"
        )
    except Exception as error:
        if full := disk_full(error):
            sys.exit(
                f"error: the disk is full, or a quota is used up ({first_line(full)}); "
                "free space, then `dvc repro` (`dvc checkout` restores what was there)"
            )
        if isinstance(error, OSError) and error.filename:
            sys.exit(
                f"error: {error.filename}: {error.strerror}; "
                "correct the path or its permissions, then `dvc repro`"
            )
        raise


def leave() -> NoReturn:
    """End a launched process without Python's finalization, with exit code 0.

    A thread of gloo that frees a tensor meanwhile aborts the process, though all is saved
    (https://github.com/pytorch/pytorch/pull/179291). Seen with torch 2.13.0.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def at_success(action: Callable[[], None]) -> None:
    """Run `action` once nothing can fail any more: at the end of the command, or now where none runs.

    For what removes something that a failed run would resume from.
    """
    if _at_success is None:
        action()
    else:
        _at_success.append(action)


def arguments(description: str | None, *paths: str, of: str | None = None) -> argparse.Namespace:
    """What dvc.yaml passes to a stage: one required option for each path.

    Args:
        of: a stage that runs once for each source, or benchmark, has the name of one as its first argument.
    """
    parser = argparse.ArgumentParser(description=description)
    if of is not None:
        parser.add_argument(of)
    for name in paths:
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def end_with_parent(parent: int | None = None) -> None:
    """Have Linux send SIGTERM to this process when its parent ends (PR_SET_PDEATHSIG of prctl(2)).

    Without it, a stage whose `dvc` was killed would go on next to its successor. SIGTERM lets training save a
    checkpoint first. A forked child passes the pid of its `parent`.
    """
    die_with_parent(signal.SIGTERM)
    if os.getppid() != (parent or PARENT_OF.get(os.getpid(), os.getppid())):
        os._exit(1)


def die_with_parent(signal_number: int) -> None:
    """Choose the signal that this process gets when its parent ends; 0 for none."""
    ctypes.CDLL(None).prctl(1, signal_number)
