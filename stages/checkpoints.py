"""Checkpoints of a stage that trains or evaluates, outside its outs: a killed run goes on where it was and ends with the same bytes.

They lie in a folder named by everything that the result depends on (params, inputs, code, libraries, device, number of processes), so no other run
can pick them up. A checkpoint counts once its manifest is written, which names the hash of each of its files: one that was cut
off or damaged is passed over for the one before it. Nothing of a run is left when its stage has succeeded; of runs that were given up,
the newest few are kept.
"""

import fcntl
import json
import os
import shutil
import signal
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

from stages import InputError, die_with_parent, launch, provenance
from stages.records import digest, write_json

KEPT = 2
"""Checkpoints of a run, and runs of a stage."""
GRACE = 600
"""Seconds that the optimizer step under way has to end after SIGTERM."""
LIBRARIES = ("accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers", "trl")
MANIFEST = "manifest.json"
RESULTS = "results.json"


def interval() -> float:
    """Seconds between two checkpoints: what a killed run does again at most, beside measuring. No number of them changes a byte of the result."""
    found = os.environ.get("REPROTUNE_CHECKPOINT_SECONDS", "600")
    try:
        seconds = float(found)
        assert seconds >= 0
        return seconds
    except (ValueError, AssertionError):
        raise InputError(f"REPROTUNE_CHECKPOINT_SECONDS: found {found!r}, expected a number of seconds; correct or unset it") from None


@contextmanager
def kept(folder: Path, settings: Mapping[str, Any], inputs: list[Path]) -> Iterator[Path]:
    """Yield where a run's checkpoints lie under `folder`, its stage's own; removed on success. One run at a time, others wait."""
    run = folder / fingerprint(settings, inputs)
    if not launch.is_main():
        yield run
        return
    run.mkdir(parents=True, exist_ok=True)
    run.touch()
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another run of this stage has not ended yet: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        runs = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
        for old in runs[:-KEPT]:
            shutil.rmtree(old)
        yield run
        provenance.when_done(partial(shutil.rmtree, run))


def fingerprint(settings: Mapping[str, Any], inputs: list[Path]) -> str:
    """Of all that a stage's result depends on: its params, its inputs' contents, the number of processes, the device, libraries, and the code that is loaded."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = xxhash.xxh3_128(json.dumps([settings, launch.world_size(), device, [version(name) for name in LIBRARIES]], sort_keys=True).encode())
    for path in [*inputs, *loaded_code()]:
        for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
            found.update(f"{file.relative_to(path)} {file.name} {digest(file)}\n".encode())
    return found.hexdigest()


def loaded_code() -> list[Path]:
    """The files of this package that are loaded, the stage's own, which runs under another name, included."""
    # as text: of thousands of modules, paths would take a quarter of a second
    folder = os.path.dirname(__file__)
    return sorted({Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None)) and os.path.dirname(file) == folder})


def number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def found_in(run: Path) -> list[Path]:
    """Checkpoints, whole or not, the oldest first."""
    return sorted((path for path in run.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()), key=number)


def seal(checkpoint: Path) -> None:
    """Write the manifest, after every byte of the checkpoint has reached the disk."""
    digests = {}
    for file in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        with file.open("rb") as content:
            os.fsync(content.fileno())
        digests[file.relative_to(checkpoint).as_posix()] = digest(file)
    assert digests, f"{checkpoint} is empty"
    write_json(checkpoint / MANIFEST, digests)


def save(run: Path, count: int, write: Callable[[Path], None]) -> None:
    """Seal what `write` writes as the checkpoint of this number, and remove those that are too many."""
    checkpoint = run / f"checkpoint-{count}"
    checkpoint.mkdir(parents=True)
    write(checkpoint)
    seal(checkpoint)
    for old in found_in(run)[:-KEPT]:
        shutil.rmtree(old)


def whole(checkpoint: Path) -> bool:
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text())
        return len(digests) > 0 and all(digest(checkpoint / name) == found for name, found in digests.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint. What is passed over for it is named and removed, lest it be taken for a newer one when old ones are."""
    if launch.is_main():
        for checkpoint in reversed(found_in(run)):
            if whole(checkpoint):
                print(f"going on from {checkpoint.name} in {run}", flush=True)
                break
            print(f"{checkpoint} is incomplete or damaged: passed over", flush=True)
            shutil.rmtree(checkpoint)
    left = [path.name for path in found_in(run)[-1:]] if launch.is_main() else []
    if torch.distributed.is_initialized():
        # the others ask no folder of their own: on a shared file system it may show what is gone
        names = [left]
        torch.distributed.broadcast_object_list(names)
        left = names[0]
    return run / left[0] if left else None


class Ending:
    """Whether the process was asked to end, by SIGTERM or Ctrl-C, while it listens."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, *_: Any) -> None:
        """Asked once more, or after GRACE, the process ends at once. That its parent ends, asked along with it, is not asking once more."""
        self.asked = True
        die_with_parent(0)
        if launch.world_size() == 1:
            # a launcher asks its processes several times by itself
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(GRACE)

    @contextmanager
    def listening(self) -> Iterator[None]:
        handlers = {name: signal.signal(name, self.ask) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            signal.alarm(0)
            for name, handler in handlers.items():
                signal.signal(name, handler)


def agreed(*flags: bool) -> list[bool]:
    """Each true if it is on any process."""
    found = torch.tensor(flags, dtype=torch.float32)
    if torch.distributed.is_initialized():
        found = found.to("cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def results(run: Path | None, total: int, rest: Callable[[int], Iterator[Any]]) -> list[Any]:
    """What `rest` computes behind as many results as it is given the number of. They are kept in `run`, if there is one, at intervals and when the process is asked
    to end: a killed run goes on behind those.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C, once they are saved.
    """
    if run is None:
        return list(rest(0))
    start, ending, last_saved = latest(run), Ending(), time.monotonic()
    found = [] if start is None else json.loads((start / RESULTS).read_text())
    with ending.listening():
        for one in rest(len(found)):
            found.append(one)
            due, stop = agreed(time.monotonic() - last_saved >= interval(), ending.asked)
            if (due or stop) and len(found) < total:
                if launch.is_main():
                    # in full precision, unlike a record
                    save(run, len(found), lambda checkpoint: (checkpoint / RESULTS).write_text(json.dumps(found)))
                last_saved = time.monotonic()
                if stop:
                    sys.exit(f"ended on request after {len(found)} of {total} batches: `dvc repro` goes on from there")
    return found
