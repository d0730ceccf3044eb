"""Callbacks for TRL's trainers: save checkpoints, measure, and stop at a loss that is not finite."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from reprotune.errors import InputError
from reprotune.training import checkpoints, distributed
from reprotune.training.speed import peak_memory
from reprotune.training.stopping import StopRequest


class StopAtNonFinite(TrainerCallback):
    """Stop at the first step whose loss or gradient norm is not finite."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: Any,
    ) -> None:
        for key in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise InputError(
                    f"step {state.global_step}: {key} is {logs[key]}, expected a finite number; "
                    "lower learning_rate, or max_grad_norm"
                )


class SaveCheckpoints(TrainerCallback, ExportableState):
    """Save and seal a checkpoint at intervals and on request, with `records` in the trainer's state.

    `records` holds lists: `seconds` and `memory_mib` (see `peak_memory`) of each step, and the measurements
    `before` training and `on_the_way`.
    """

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = {"seconds": [], "memory_mib": [], "before": [], "on_the_way": []}
        self.interval = checkpoints.interval()
        self.stop_request = StopRequest()
        self.last_saved = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What the trainer writes to trainer_state.json."""
        return {"args": {}, "attributes": {"records": self.records}}

    def restore(self, trainer_state: Mapping[str, Any]) -> None:
        """Take `records` from the content of trainer_state.json."""
        self.records = trainer_state["stateful_callbacks"][type(self).__name__]["attributes"]["records"]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step_start = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.records["seconds"].append(time.monotonic() - self.step_start)
        self.records["memory_mib"].append(peak_memory())
        due, stop = distributed.on_any_process(
            time.monotonic() - self.last_saved >= self.interval, self.stop_request.received
        )
        control.should_save = due or stop
        control.should_training_stop = control.should_training_stop or stop

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        distributed.wait_for_all()
        if state.is_world_process_zero:
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.last_saved = time.monotonic()


class Measure(TrainerCallback):
    """Measure each part of the data before training, and `held_out` also after evenly spread steps.

    It must run after the clock of `SaveCheckpoints`, which stops at the end of a step.

    Args:
        saving: has the records `before` and `on_the_way`, which this fills.
        times: measurements on the way.
        parts: `held_out`, and others that are measured only before and after training.
        measure: given a part and the label of a progress bar, returns its values by name.
        check: given what was measured before training, raises if it must not begin.
    """

    def __init__(
        self,
        saving: SaveCheckpoints,
        times: int,
        steps: int,
        parts: tuple[str, ...],
        measure: Callable[[str, str], dict[str, float]],
        check: Callable[[Mapping[str, Mapping[str, float]]], None] = lambda _: None,
    ) -> None:
        self.saving, self.parts, self.measure, self.check = saving, parts, measure, check
        self.steps = {round(steps * number / (times + 1)) for number in range(1, times + 1)} - {0, steps}

    def all_parts(self, when: str) -> dict[str, dict[str, float]]:
        return {part: self.measure(part, f"measuring {part} {when}") for part in self.parts}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:
            before = self.all_parts("before")
            self.check(before)
            self.saving.records["before"].append(before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step in self.steps:
            values = self.measure("held_out", f"measuring held_out after step {state.global_step}")
            self.saving.records["on_the_way"].append({"step": state.global_step, **values})
