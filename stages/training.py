"""What the SFT and the DPO stage share: trainer arguments, curves, and measuring on rows that are not trained on.

A global batch is split over devices and accumulation steps as the machine allows; the run is the same.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from datasets.table import InMemoryTable
from peft import PeftModel
from tqdm import tqdm
from transformers import TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from stages import InputError, checkpoints, first_line
from stages.chat import IGNORED
from stages.params import Model, Training
from stages.records import read_parquet, write_csv


def arguments(settings: Training, dtype: str, seed: int, folder: Path, processes: int) -> dict[str, Any]:
    """Keyword arguments for TRL's SFTConfig and DPOConfig alike; checkpoints lie in `folder`, saved when `checkpoints` says."""
    rows_at_once = settings.micro_batch_size * processes
    if settings.global_batch_size % rows_at_once:
        raise InputError(
            f"params.yaml: global_batch_size: found {settings.global_batch_size}, expected a multiple of micro_batch_size × "
            f"devices = {settings.micro_batch_size} × {processes}; change one of them or use fewer devices"
        )
    return {
        "output_dir": str(folder),
        "save_strategy": "no",
        "save_total_limit": checkpoints.KEPT,
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.global_batch_size // rows_at_once,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "bf16": dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
    }


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


def write_curves(rows: list[dict[str, float]], seconds: list[float], curves: Path, speed: Path) -> None:
    """The curve, the same on every run, and beside it the speed, which is not."""
    write_csv(curves, rows, list(rows[0]))
    tokens = [0, *(row["tokens"] for row in rows)]
    speeds = [
        {"step": row["step"], "seconds": round(took, 3), "tokens_per_second": round((after - before) / took, 1)}
        for row, took, (before, after) in zip(rows, seconds, pairwise(tokens), strict=True)
    ]
    write_csv(speed, speeds, ["step", "seconds", "tokens_per_second"])


ISOLATION = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference of a logit between an example alone and behind another one; a leak was seen to make 22."""
PROBED = 64
"""Tokens of each example that are compared."""


def check_isolation(model: PeftModel, rows: datasets.Dataset, settings: Model) -> None:
    """Stop before a model is trained whose attention lets an example see the one that it is packed behind.

    Rows, packed or not, are laid out one behind another in a micro-batch, told apart by their positions alone.

    Raises:
        InputError: the second of the first two examples has other logits behind the first than alone.
    """
    found: list[list[int]] = []
    for row in rows:
        starts = [0, *accumulate(row["seq_lengths"])]
        found += [row["input_ids"][start:end][:PROBED] for start, end in pairwise(starts)]
        if len(found) > 1:
            break
    else:
        return
    first, second = (torch.tensor([ids], device=model.device) for ids in found[:2])
    positions = torch.cat([torch.arange(ids.shape[1], device=model.device) for ids in (first, second)])[None]
    with measuring(model):
        alone = model(input_ids=second, use_cache=False).logits[0]
        behind = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits[0, first.shape[1] :]
    difference = float((behind - alone).abs().max())
    if not alone.isfinite().all():
        raise InputError("models/base: it computes logits that are not finite; correct model.source, or model.dtype")
    if not difference <= ISOLATION[settings.dtype]:
        raise InputError(
            f"params.yaml: model.attention: {settings.attention} attention lets examples see those that they are packed behind: a logit differs by "
            f"{difference:.3g}, expected at most {ISOLATION[settings.dtype]}; use one that keeps them apart (sdpa does for Llama and Qwen models)"
        )


@contextmanager
def measuring(model: PeftModel) -> Iterator[None]:
    """No gradients, no dropout, and the arithmetic of training: bfloat16 where the model is in it."""
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        yield
    model.train(training)


def loss_per_token(model: PeftModel, rows: datasets.Dataset, pad_token_id: int, batch_size: int, label: str) -> float:
    """Mean negative log-likelihood, in nats, of the labelled tokens of packed rows. Each process computes all of it."""
    collate = DataCollatorForLanguageModeling(pad_token_id, padding_free=True)
    total, count = 0.0, 0
    with measuring(model):
        for start in tqdm(range(0, len(rows), batch_size), desc=label, unit="batch"):
            batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
            inputs = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            outputs = model(**inputs, fused_lm_head=True)
            total -= float(outputs.log_probs.double().sum())
            count += int(outputs.label_mask.sum())
    return total / count


def pair_log_probs(
    model: PeftModel, rows: datasets.Dataset, pad_token_id: int, batch_size: int, label: str, run: Path | None = None
) -> dict[str, list[float]]:
    """Summed log-probs, in nats, of each pair's chosen and rejected answer given its prompt, in the order of `rows`.

    Pairs of like length are computed together. The model has TRL's fused head, which computes only what labels ask for.
    With `run`, checkpoints of what is done are saved there, and the newest one is taken up.
    """
    collate = DataCollatorForPreference(pad_token_id)
    length = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: (length[index], index))
    found: dict[str, list[float]] = {"chosen": [0.0] * len(rows), "rejected": [0.0] * len(rows)}
    done = 0
    if run is not None and (start := checkpoints.latest(run)) is not None:
        done, found = checkpoints.number(start), json.loads((start / "log_probs.json").read_text())
    last_saved = time.monotonic()
    with measuring(model):
        for start in tqdm(range(done, len(rows), batch_size), desc=label, unit="batch", initial=done // batch_size, total=-(-len(rows) // batch_size)):
            if run is not None and start > done and time.monotonic() - last_saved >= checkpoints.interval():
                # in full precision, unlike a record
                content = json.dumps(found)
                checkpoints.save(run, start, lambda checkpoint: (checkpoint / "log_probs.json").write_text(content))  # noqa: B023
                last_saved = time.monotonic()
            indices = order[start : start + batch_size]
            batch = {key: value.to(model.device) for key, value in collate([rows[index] for index in indices]).items()}
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
            log_probs = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True).log_probs
            sums = log_probs.float().sum(dim=1).tolist()
            if not all(map(math.isfinite, sums)):
                raise InputError(f"{label}: the model gives a log-prob of {next(s for s in sums if not math.isfinite(s))}; its adapter or base is damaged")
            for position, index in enumerate(indices):
                found["chosen"][index], found["rejected"][index] = sums[position], sums[len(indices) + position]
    return found
