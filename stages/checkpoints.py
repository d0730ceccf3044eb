"""Checkpoints of a training stage, outside its outs: a killed run goes on where it was and ends with the same bytes.

They lie in a folder named by everything that the result depends on (params, inputs, code, number of processes), so no other run
can pick them up. A checkpoint counts once its manifest is written, which names the hash of each of its files: one that was cut
off or damaged is passed over for the one before it. Nothing of a run is left when its stage has succeeded; of runs that were given up,
the newest few are kept.
"""

import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from stages import InputError, die_with_parent, launch
from stages.records import digest, write_json

KEPT = 2
"""Checkpoints of a run, and runs of a stage."""
GRACE = 600
"""Seconds that the optimizer step under way has to end after SIGTERM."""
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
        shutil.rmtree(run)


def fingerprint(settings: Mapping[str, Any], inputs: list[Path]) -> str:
    """Of all that a stage's result depends on: its params, its inputs' contents, the number of processes, and the code that is loaded."""
    found = xxhash.xxh3_128(json.dumps([settings, launch.world_size()], sort_keys=True).encode())
    for path in [*inputs, *loaded_code()]:
        for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
            found.update(f"{file.relative_to(path)} {file.name} {digest(file)}\n".encode())
    return found.hexdigest()


def loaded_code() -> list[Path]:
    """The files of this package that are loaded, the stage's own, which runs under another name, included."""
    files = {Path(file).resolve() for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    return sorted(file for file in files if file.parent == Path(__file__).resolve().parent)


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


def wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
        yield
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


class Checkpoints(TrainerCallback, ExportableState):
    """Saves at intervals and when the process is asked to end, seals what was saved, and keeps what a trainer's own state leaves out.

    `records` are lists that others add to: what they hold at a checkpoint is there again after it. `seconds` are those that each optimizer step took,
    `memory_mib` what the process had used at most by then: of the GPU's memory, or where there is none of the machine's.
    """

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = {"seconds": [], "memory_mib": [], "before": [], "held_out": []}
        self.interval = interval()
        self.ending = Ending()
        self.last_saved = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"records": self.records}}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.monotonic()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.records["seconds"].append(time.monotonic() - self.begin)
        self.records["memory_mib"].append(peak_memory())
        due, stop = agreed(time.monotonic() - self.last_saved >= self.interval, self.ending.asked)
        control.should_save = due or stop
        control.should_training_stop = control.should_training_stop or stop

    def on_save(self, args, state, control, **_: Any) -> None:
        wait_for_all()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.last_saved = time.monotonic()


def train(trainer: Trainer, checkpoints: Checkpoints, run: Path) -> None:
    """`trainer.train()`, from the newest whole checkpoint in `run`.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is saved.
    """
    start = latest(run)
    if start is not None:
        state = json.loads((start / "trainer_state.json").read_text())
        checkpoints.records = state["stateful_callbacks"]["Checkpoints"]["attributes"]["records"]
        # TRL's count of tokens, which it would start anew
        trainer._total_train_tokens = [entry["num_tokens"] for entry in state["log_history"] if "num_tokens" in entry][-1]
    with checkpoints.ending.listening():
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if trainer.state.global_step < trainer.state.max_steps:
        sys.exit(f"ended on request at step {trainer.state.global_step} of {trainer.state.max_steps}: `dvc repro` goes on from there")
