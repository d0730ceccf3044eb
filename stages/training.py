"""What the SFT and the DPO stage share: trainer arguments, curves, and measuring on rows that are not trained on.

A global batch is split over devices and accumulation steps as the machine allows; the run is the same.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
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
from transformers import AttentionInterface, TrainerCallback
from transformers.integrations.sdpa_attention import repeat_kv
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from stages import InputError, checkpoints, first_line, launch
from stages.chat import IGNORED
from stages.modeling import Policy, bare, measuring
from stages.params import Model, Training
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
    rows_at_once = settings.micro_batch_size * processes
    if settings.global_batch_size % rows_at_once:
        raise InputError(
            f"params.yaml: global_batch_size: found {settings.global_batch_size}, expected a multiple of micro_batch_size × "
            f"devices = {settings.micro_batch_size} × {processes}; change one of them or use fewer devices"
        )
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
        "gradient_accumulation_steps": settings.global_batch_size // rows_at_once,
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


class Measuring(TrainerCallback):
    """Measures before the first step, into the record `before`, and after steps that are spread evenly over the run, into `held_out`.

    The trainer has by then prepared the model: dealt it out to devices, or gone on from a checkpoint, which has what was measured before. Stands behind the
    clock of `Checkpoints`.
    """

    def __init__(
        self, saving: checkpoints.Checkpoints, times: int, steps: int, before: Callable[[], Any], measure: Callable[[str], Mapping[str, float]]
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


def check_labels(rows: datasets.Dataset) -> None:
    """Stop before rows are trained on that nothing is learned from.

    Raises:
        InputError: a row has no label.
    """
    labels = rows.data.column("labels").combine_chunks()
    starts = labels.offsets.to_numpy()[:-1]
    found = np.logical_or.reduceat(labels.flatten().to_numpy() != IGNORED, starts)
    if not found.all():
        raise InputError(f"data/tokenized/sft: row {int(np.argmin(found))} has no label to train on; `dvc repro tokenize_sft` makes the rows anew")


BY_EXAMPLE = "sdpa_by_example"
"""Name, among transformers' attentions, of the one below."""


def attention_by_example(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, scaling: float,
    position_ids: torch.Tensor, dropout: float = 0.0, sliding_window: int | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Causal attention within each of the examples that lie one behind another in one row, told apart by their positions.

    sdpa would compute all pairs of tokens of the row, under a mask that its fast kernels do not take.

    Args:
        query: (1, heads, tokens, width); key and value have as many heads or a divisor of that.
    """
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    return attention_in_parts(query, key, value, [end - start for start, end in pairwise([*starts, query.shape[2]])], scaling, dropout, sliding_window)


def attention_in_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float, dropout: float, sliding_window: int | None
) -> tuple[torch.Tensor, None]:
    """Of examples of these lengths; (rows, tokens, heads, width)."""
    groups = query.shape[1] // key.shape[1]
    parts = []
    for one in zip(*(whole.split(lengths, dim=2) for whole in (query, repeat_kv(key, groups), repeat_kv(value, groups))), strict=True):
        length, mask = one[0].shape[2], None
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        parts.append(torch.nn.functional.scaled_dot_product_attention(*one, mask, dropout, is_causal=mask is None, scale=scaling))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(BY_EXAMPLE, attention_by_example)


ISOLATION = {"float32": 1e-3, "bfloat16": 1.0}
"""Largest difference of a logit between an example alone and behind another one; a leak was seen to make 22."""
PROBED = 64
"""Tokens of each example that are compared."""


def check_isolation(model: Policy, rows: datasets.Dataset, settings: Model) -> None:
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


def loss_per_token(model: Policy, rows: datasets.Dataset, pad_token_id: int, batch_size: int, label: str) -> float:
    """Mean negative log-likelihood, in nats, of the labelled tokens of packed rows."""
    collate = DataCollatorForLanguageModeling(pad_token_id, padding_free=True)

    def loss(start: int) -> tuple[float, int]:
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        inputs = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        outputs = model(**inputs, fused_lm_head=True)
        return -float(outputs.log_probs.double().sum()), int(outputs.label_mask.sum())

    with measuring(model):
        losses, counts = zip(*dealt_out(range(0, len(rows), batch_size), loss, label), strict=True)
    return sum(losses) / sum(counts)


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
