"""What the SFT and the DPO stage share: trainer arguments, curves, and measuring on rows that are not trained on.

A global batch is split over devices and accumulation steps as the machine allows; the run is the same.
"""

import importlib.util
import json
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import trl.trainer.utils
from datasets.table import InMemoryTable
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from stages import InputError, checkpoints, first_line, launch
from stages.modeling import Policy, bare
from stages.params import Training
from stages.records import read_parquet, write_csv

T = TypeVar("T")
Result = TypeVar("Result")

# TRL's head, where there is no Triton, scores all positions, to spare compilers new shapes; nothing is compiled here, so
# that it scores those with labels alone saves a large part of its work.
trl.trainer.utils._use_triton = lambda _: True


def arguments(settings: Training, seed: int, steps: int, folder: Path, processes: int) -> dict[str, Any]:
    """Keyword arguments for TRL's SFTConfig and DPOConfig alike; checkpoints lie in `folder`, saved when `checkpoints` says.

    Rows come in the order of `batches`, so that no split of a global batch over devices and accumulation changes what is in it.
    """
    if settings.use_liger_kernel and not torch.cuda.is_available():
        raise InputError("params.yaml: use_liger_kernel: found true, expected false on a machine without a GPU")
    if settings.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise InputError("params.yaml: use_liger_kernel: found true, and the package is not installed; `.venv/bin/pip install liger-kernel`")
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "save_total_limit": checkpoints.KEPT,
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation(settings, processes),
        "learning_rate": settings.learning_rate,
        # transformers' own constant one knows no warm-up
        "lr_scheduler_type": "constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_liger_kernel": settings.use_liger_kernel,
        # models compute in their dtype by themselves
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
    }


def accumulation(settings: Training, processes: int) -> int:
    """Micro-batches that each process computes for an optimizer step.

    Raises:
        InputError: the global batch does not divide into them.
    """
    at_once = settings.micro_batch_size * processes
    if settings.global_batch_size % at_once:
        raise InputError(
            f"{type(settings).__name__.lower()}.global_batch_size: found {settings.global_batch_size}, expected a multiple of micro_batch_size × "
            f"devices = {settings.micro_batch_size} × {processes}; change one of them or use fewer devices"
        )
    return settings.global_batch_size // at_once


def shards(folder: Path, part: str) -> datasets.Dataset:
    """The rows of all shards of `part`, mapped into memory as they are read: no copy of them is left in a cache folder.

    Raises:
        InputError: there is no shard, or one is damaged.
    """
    files = sorted(folder.glob(f"{part}-*.arrow"))
    if not files:
        raise InputError(f"{folder}: no shard {part}-*.arrow; `dvc checkout {folder}` restores it, `dvc repro` makes it anew")
    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{folder}: a shard of {part} is damaged ({first_line(error)}); `dvc checkout {folder}` restores it") from error


def batches(rows: datasets.Dataset, columns: list[str], steps: int, size: int, seed: int) -> datasets.Dataset:
    """The rows of `steps` global batches of `size`, one behind another: pass after pass over all rows, each in an order of its own.

    Within a batch the longest come first, so that rows which are computed at once are of like length; `columns` hold their tokens.
    """
    passes = -(-steps * size // len(rows))
    order = np.concatenate([np.random.default_rng((seed, number)).permutation(len(rows)) for number in range(passes)])
    order = order[: steps * size].reshape(steps, size)
    lengths = sum(pc.list_value_length(rows.data.column(column)).to_numpy() for column in columns)
    longest_first = np.argsort(-lengths[order], axis=1, kind="stable")
    return rows.select(np.take_along_axis(order, longest_first, axis=1).ravel(), keep_in_memory=True)


def table(path: Path) -> datasets.Dataset:
    """A Parquet file as a dataset held in memory."""
    return datasets.Dataset(InMemoryTable(read_parquet(path)))


class FiniteLoss(TrainerCallback):
    """Stop at the first step whose loss or gradient is no number: what follows could only be lost time."""

    def on_log(self, args, state, control, logs, **_: Any) -> None:
        for key in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise InputError(f"step {state.global_step}: {key} is {logs[key]}, expected a finite number; lower learning_rate, or max_grad_norm")


def curve(log_history: list[dict[str, float]], names: dict[str, str]) -> list[dict[str, float]]:
    """One row a step from a trainer's log, under our names; `num_tokens` there counts from the start."""
    return [
        {"step": entry["step"], **{ours: entry[theirs] for ours, theirs in names.items()}} for entry in log_history if "loss" in entry
    ]


def wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Checkpoints(TrainerCallback, ExportableState):
    """Saves at intervals and when the process is asked to end, seals what was saved, and keeps what a trainer's own state leaves out.

    `records` are lists that others add to: what they hold at a checkpoint is there again after it. `seconds` are those that each optimizer step took,
    `memory_mib` what the process had used at most by then: of the GPU's memory, or where there is none of the machine's.
    """

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = {"seconds": [], "memory_mib": [], "before": [], "held_out": []}
        self.interval = checkpoints.interval()
        self.ending = checkpoints.Ending()
        self.last_saved = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"records": self.records}}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.monotonic()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.records["seconds"].append(time.monotonic() - self.begin)
        self.records["memory_mib"].append(peak_memory())
        due, stop = checkpoints.agreed(time.monotonic() - self.last_saved >= self.interval, self.ending.asked)
        control.should_save = due or stop
        control.should_training_stop = control.should_training_stop or stop

    def on_save(self, args, state, control, **_: Any) -> None:
        wait_for_all()
        if state.is_world_process_zero:
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.last_saved = time.monotonic()


def train(trainer: Trainer, saving: Checkpoints, run: Path) -> None:
    """`trainer.train()`, from the newest whole checkpoint in `run`.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is saved.
    """
    start = checkpoints.latest(run)
    if start is not None:
        state = json.loads((start / "trainer_state.json").read_text())
        saving.records = state["stateful_callbacks"]["Checkpoints"]["attributes"]["records"]
        # TRL's count of tokens, which it would start anew
        trainer._total_train_tokens = [entry["num_tokens"] for entry in state["log_history"] if "num_tokens" in entry][-1]
    with saving.ending.listening():
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if trainer.state.global_step < trainer.state.max_steps:
        sys.exit(f"ended on request at step {trainer.state.global_step} of {trainer.state.max_steps}: `dvc repro` goes on from there")


class Measuring(TrainerCallback):
    """Measures before the first step, into the record `before`, and after steps that are spread evenly over the run, into `held_out`.

    The trainer has by then prepared the model: dealt it out to devices, or gone on from a checkpoint, which has what was measured before. Stands behind the
    clock of `Checkpoints`.
    """

    def __init__(
        self, saving: Checkpoints, times: int, steps: int, before: Callable[[], Any], measure: Callable[[str], Mapping[str, float]]
    ) -> None:
        self.saving, self.before, self.measure = saving, before, measure
        self.steps = {round(steps * number / (times + 1)) for number in range(1, times + 1)} - {0, steps}

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        if state.global_step == 0:
            self.saving.records["before"].append(self.before())

    def on_step_end(self, args, state, control, **_: Any) -> None:
        if state.global_step in self.steps:
            found = self.measure(f"held-out rows after step {state.global_step}")
            self.saving.records["held_out"].append({"step": state.global_step, **found})


def write_curves(plots: Path, stage: str, rows: list[dict[str, float]], held_out: list[dict[str, float]], speed: list[dict[str, float]]) -> None:
    """The curve and the held-out rows' measurements, the same on every run, and beside them the speed, which is not."""
    for name, table in ((stage, rows), (f"{stage}_held_out", held_out), (f"{stage}_speed", speed)):
        write_csv(plots / f"{name}.csv", table, list(table[0]))


def speed(tokens: Sequence[int], records: Mapping[str, list[float]], flops_per_token: float | None, dtype: str) -> list[dict[str, float]]:
    """A row a step, of which `tokens` says how many it computed: seconds, tokens a second, peak memory in MiB, and MFU, in percent of what the devices can do,
    where that is known."""
    peak = device_flops(dtype)
    found = []
    for step, (count, took, memory) in enumerate(zip(tokens, records["seconds"], records["memory_mib"], strict=True), start=1):
        per_second = count / took
        found.append({"step": step, "seconds": round(took, 3), "tokens_per_second": round(per_second, 1), "memory_mib": round(memory)})
        if peak is not None and flops_per_token is not None:
            found[-1]["mfu"] = round(trl.trainer.utils.compute_mfu(flops_per_token, per_second, launch.world_size(), peak), 2)
    return found


def flops_per_token(policy: Policy, length: float) -> float | None:
    """Of a training step on examples of `length` tokens: forward, backward through all activations, and through the weights that are trained.

    TRL's own count takes all weights to be trained; an adapter's are so few that its base's part of the backward pass falls away. None for
    an architecture that TRL cannot count.
    """
    try:
        whole = trl.trainer.utils.compute_flops_per_token(bare(policy).config.get_text_config(), round(length))
    except AttributeError:
        return None
    return whole if bare(policy) is policy else whole * 2 / 3


def devices() -> list[str]:
    """What each process of this run trains on, by name."""
    if torch.cuda.is_available():
        own = torch.cuda.get_device_name()
    else:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        own = f"{torch.get_num_threads()} cores of {names[0] if names else platform.machine()}"
    return [own] * launch.world_size()


def device_flops(dtype: str) -> float | None:
    """What one device can do a second: a GPU by its maker's data, a CPU by what a large product in float32 reaches on it now."""
    if torch.cuda.is_available():
        return trl.trainer.utils.get_peak_flops(torch.cuda.get_device_name(), dtype)
    one = torch.ones(PROBE, PROBE)
    took = []
    for _ in range(3):
        begin = time.monotonic()
        one @ one
        took.append(time.monotonic() - begin)
    return 2 * PROBE**3 / min(took)


PROBE = 2048
"""Rows and columns of the matrices that a CPU is measured with."""


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """The trained weights whole on every process, where DeepSpeed's ZeRO-3 has them in parts."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not hasattr(trained[0], "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(trained):
        yield


def dealt_out(items: Sequence[T], compute: Callable[[T], Result], label: str, done: int = 0) -> Iterator[Result]:
    """`compute` of each item, in order, behind the first `done`; all processes compute, each an item of its own, and all get every result.

    Where items are left over, the last one is computed once more: a model that lies in parts on all processes takes all of them for a step.
    """
    world, rank = launch.world_size(), launch.rank()
    with tqdm(desc=label, unit="batch", total=len(items), initial=done) as bar:
        for start in range(done, len(items), world):
            results = [compute(items[min(start + rank, len(items) - 1)])]
            if world > 1:
                own, results = results[0], [None] * world
                torch.distributed.all_gather_object(results, own)
            results = results[: len(items) - start]
            bar.update(len(results))
            yield from results
