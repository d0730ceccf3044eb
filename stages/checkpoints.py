"""Checkpoints of a training stage, outside its outs: a killed run goes on where it was and ends with the same bytes.

They lie in a folder named by everything that the result depends on, params, inputs and code, so no other run can pick them
up. A checkpoint counts once its manifest is written, which names the hash of each of its files: one that was cut off or
damaged is passed over for the one before it. Nothing is left when the stage has succeeded.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from stages.records import write_json

FOLDER = Path(".dvc/tmp/checkpoints")
SECONDS = float(os.environ.get("REPROTUNE_CHECKPOINT_SECONDS", "600"))
"""Time between two checkpoints: the most that a killed run does again. No number of them changes a byte of the result."""
KEPT = 2
MANIFEST = "manifest.json"


def fingerprint(params: Mapping[str, Any], inputs: list[Path]) -> str:
    """Of all that a stage's result depends on: its params, its inputs' contents, and the code that is loaded."""
    code = [Path(module.__file__) for name, module in sorted(sys.modules.items()) if name.split(".")[0] == "stages" and module.__file__]
    files = [file for path in [*inputs, *code] for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]
    found = xxhash.xxh3_128(json.dumps(params, sort_keys=True).encode())
    for file in files:
        found.update(file.name.encode())
        found.update(digest(file).encode())
    return found.hexdigest()


def digest(file: Path) -> str:
    found = xxhash.xxh3_128()
    with file.open("rb") as content:
        while block := content.read(2**22):
            found.update(block)
    return found.hexdigest()


@contextmanager
def kept(stage: str, name: str, main: bool = True) -> Iterator[Path]:
    """Yield the folder for a run's checkpoints; it is removed on success, as are those of the stage's other runs."""
    folder = FOLDER / stage / name
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    if main:
        shutil.rmtree(FOLDER / stage, ignore_errors=True)


def seal(checkpoint: Path) -> None:
    """Write the manifest, after every byte of the checkpoint has reached the disk."""
    digests = {}
    for file in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        with file.open("rb") as content:
            os.fsync(content.fileno())
        digests[file.relative_to(checkpoint).as_posix()] = digest(file)
    write_json(checkpoint / MANIFEST, digests)


def whole(checkpoint: Path) -> bool:
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text())
        return all(digest(checkpoint / name) == found for name, found in digests.items())
    except (OSError, ValueError):
        return False


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint; says which it passes over."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if whole(checkpoint):
            print(f"going on from {checkpoint.name} in {folder}", flush=True)
            return checkpoint
        print(f"{checkpoint} is incomplete or damaged: passed over", flush=True)
    return None


class Checkpoints(TrainerCallback, ExportableState):
    """Saves every SECONDS and on SIGTERM, seals what was saved, and keeps what a trainer's own state leaves out.

    `seconds` are those that each optimizer step took; `tokens` TRL's count of them, which it would start anew.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.terminated = False
        self.saved = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.monotonic()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.seconds.append(time.monotonic() - self.begin)
        due = torch.tensor([time.monotonic() - self.saved >= SECONDS, self.terminated], dtype=torch.float32)
        if torch.distributed.is_initialized():
            due = due.to(args.device)
            torch.distributed.all_reduce(due, torch.distributed.ReduceOp.MAX)
        save, stop = (bool(value) for value in due.tolist())
        if (save or stop) and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = stop

    def on_save(self, args, state, control, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.saved = time.monotonic()


def train(trainer: Trainer, checkpoints: Checkpoints, folder: Path) -> None:
    """`trainer.train()`, from the newest whole checkpoint in `folder`.

    Raises:
        SystemExit: after SIGTERM, once a checkpoint is saved.
    """
    signal.signal(signal.SIGTERM, lambda *_: setattr(checkpoints, "terminated", True))
    start = latest(folder)
    if start is not None:
        state = json.loads((start / "trainer_state.json").read_text())
        checkpoints.seconds = state["stateful_callbacks"]["Checkpoints"]["attributes"]["seconds"]
        trainer._total_train_tokens = [entry["num_tokens"] for entry in state["log_history"] if "num_tokens" in entry][-1]
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if checkpoints.terminated and trainer.state.global_step < trainer.state.max_steps:
        sys.exit(f"ended by SIGTERM at step {trainer.state.global_step} of {trainer.state.max_steps}: `dvc repro` goes on from there")
