"""Checkpoints of stages that train or score: a killed run resumes and ends with the same bytes.

A run's folder is named by everything that its result depends on, so no other run can resume from it. What SFT
and DPO add to the trainer's own state stands in `callbacks`.
"""

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from reprotune import fingerprints
from reprotune.errors import InputError
from reprotune.process import at_success
from reprotune.records import digest, write_json
from reprotune.training import distributed
from reprotune.training.stopping import StopRequest

KEPT = 2
"""Checkpoints that a run keeps: the newest ones."""
KEPT_RUNS = 2
"""Unfinished runs that a stage keeps: the ones used last."""
LIBRARIES = (*fingerprints.LIBRARIES, "accelerate", "deepspeed")
"""Packages whose installed version a run is named by."""
MANIFEST = "manifest.json"
"""The hash of each file of a checkpoint. It is written last: a checkpoint without it is not whole."""
RESULTS = "results.json"


def interval() -> float:
    """Seconds between two checkpoints, which is the most that a killed run repeats. It changes no result."""
    value = os.environ.get("REPROTUNE_CHECKPOINT_SECONDS", "600")
    try:
        seconds = float(value)
        assert seconds >= 0
        return seconds
    except (ValueError, AssertionError):
        raise InputError(
            f"REPROTUNE_CHECKPOINT_SECONDS: found {value!r}, expected a number of seconds; "
            "correct or unset it"
        ) from None


@contextmanager
def kept(folder: Path, settings: Mapping[str, Any], inputs: list[Path]) -> Iterator[Path]:
    """Yield the folder of this run's checkpoints and remove it once the command has succeeded.

    Runs of one stage wait for each other.

    Args:
        folder: where the stage keeps its runs.
        settings, inputs: params and files that the result depends on.
    """
    run = folder / fingerprint(settings, inputs)
    if not distributed.is_main():
        yield run
        return
    run.mkdir(parents=True, exist_ok=True)
    run.touch()
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another run of this stage to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # this run is kept by its name: a clock that was ahead may have dated the others later
        others = [path for path in folder.iterdir() if path.is_dir() and path != run]
        for old in sorted(others, key=lambda path: path.stat().st_mtime_ns)[: 1 - KEPT_RUNS]:
            shutil.rmtree(old)
        yield run
        at_success(partial(shutil.rmtree, run))


def fingerprint(settings: Mapping[str, Any], inputs: list[Path]) -> str:
    """A hash of everything that a result depends on, as 32 hex digits.

    That is params, contents of inputs, device, number of processes, libraries and the meaning of loaded code.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    libraries = [version(name) for name in LIBRARIES]
    parts = [settings, distributed.world_size(), device, libraries, fingerprints.of_loaded()]
    hashed = xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode())
    for path in inputs:
        for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
            hashed.update(f"{file.relative_to(path)} {file.name} {digest(file)}\n".encode())
    return hashed.hexdigest()


def number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def found_in(run: Path) -> list[Path]:
    """Checkpoints, whole or not, the oldest first."""
    return sorted(
        (path for path in run.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()), key=number
    )


def seal(checkpoint: Path) -> None:
    """Write the manifest once every byte of the checkpoint has reached the disk."""
    digests = {}
    for file in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        with file.open("rb") as content:
            os.fsync(content.fileno())
        digests[file.relative_to(checkpoint).as_posix()] = digest(file)
    assert digests, f"{checkpoint} is empty"
    write_json(checkpoint / MANIFEST, digests)


def save(run: Path, count: int, write: Callable[[Path], object]) -> None:
    """Have `write` fill checkpoint number `count`, seal it, and remove all but the KEPT newest."""
    checkpoint = run / f"checkpoint-{count}"
    checkpoint.mkdir(parents=True)
    write(checkpoint)
    seal(checkpoint)
    for old in found_in(run)[:-KEPT]:
        shutil.rmtree(old)


def is_whole(checkpoint: Path) -> bool:
    """Whether each file has the hash that the manifest gives it."""
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text())
        return len(digests) > 0 and all(digest(checkpoint / name) == value for name, value in digests.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint, the same on every process; None if there is none.

    Newer ones that are damaged are removed: otherwise they would count among the KEPT newest.
    """
    names: list[str] = []
    if distributed.is_main():
        for checkpoint in reversed(found_in(run)):
            if is_whole(checkpoint):
                print(f"resuming from {checkpoint.name} in {run}", flush=True)
                names = [checkpoint.name]
                break
            print(f"{checkpoint} is incomplete or damaged: skipped", flush=True)
            shutil.rmtree(checkpoint)
    if torch.distributed.is_initialized():
        # a shared file system may show the other processes what is already removed
        message = [names]
        torch.distributed.broadcast_object_list(message)
        (names,) = message
    return run / names[0] if names else None


def results(run: Path | None, total: int, compute_rest: Callable[[int], Iterator[Any]]) -> list[Any]:
    """All `total` results, which JSON can hold, of a computation that resumes from checkpoints in `run`.

    Args:
        run: None computes without checkpoints.
        compute_rest: given the number of results at hand, yields the ones after them.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C, once the results are saved.
    """
    if run is None:
        return list(compute_rest(0))
    newest, stop_request, last_saved = latest(run), StopRequest(), time.monotonic()
    done: list[Any] = [] if newest is None else json.loads((newest / RESULTS).read_text())

    def write(checkpoint: Path) -> None:
        # not records.write_json, which rounds
        (checkpoint / RESULTS).write_text(json.dumps(done))

    with stop_request.listening():
        for result in compute_rest(len(done)):
            done.append(result)
            due, stop = distributed.on_any_process(
                time.monotonic() - last_saved >= interval(), stop_request.received
            )
            if (due or stop) and len(done) < total:
                if distributed.is_main():
                    save(run, len(done), write)
                last_saved = time.monotonic()
                if stop:
                    sys.exit(
                        f"ended on request after {len(done)} of {total} batches: `dvc repro` resumes there"
                    )
    return done
