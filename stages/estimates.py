"""How much memory and time the stages that compute with the model need, for params and devices that are given.

Weights, activations and arithmetic are counted on the model itself, which runs by its shapes alone (stages/tracing.py). Rows that are tokenized already
are counted one by one, others taken by their published sizes.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedConfig

from stages import InputError, pairs, params, tracing, training
from stages.tracing import Cost, Shape

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight: 4 bits, a byte for each block of 64, 4 bytes for each 256 blocks (https://arxiv.org/abs/2305.14314, double quantization)."""
GRADIENT, ADAM = 4, 8
"""Bytes a trained weight: all is in float32, and Adam keeps two moments."""
ZERO3_LIVE = 10**9
"""Weights that DeepSpeed's ZeRO-3 holds gathered at most, its stage3_max_live_parameters."""
REDUCE_BUCKET = 5 * 10**8
"""Gradients that DeepSpeed gathers before it sums them over devices, its reduce_bucket_size."""


@dataclass(frozen=True)
class Machine:
    name: str
    devices: int
    memory: float
    """Bytes of one device."""
    flops: float
    """A second, of one device, in model.dtype."""
    gpu: bool
    utilization: float
    """Share of `flops` that a run reaches."""


@dataclass(frozen=True)
class Kind:
    """Of GPUs, where none of it has been measured yet, and of CPUs, as `python -m perf.preflight` measured it on two cores."""

    process: float
    """Bytes that a process holds before it has a model."""
    start: float
    """Seconds until a stage computes: libraries, and the model."""
    operation: float
    """Seconds that starting a kernel takes at least."""
    held: float
    """Bytes that the allocator holds for each byte of activations that is alive."""
    utilization: float


GPU = Kind(process=0.6 * GIB, start=30, operation=8e-6, held=1.0, utilization=0.4)
CPU = Kind(process=0.75 * GIB, start=20, operation=0, held=1.55, utilization=0.6)


@dataclass(frozen=True)
class Work:
    """Tokens that a stage is to compute, over all devices, padding included."""

    largest: Shape
    """Its largest micro-batch."""
    tokens: float
    length: float
    """That a token's attention sees, in the mean over tokens."""
    micro_batches: float
    steps: int
    measured: float
    """Tokens of rows that are measured, without a backward pass."""
    held: float
    """Tokens that are tokenized."""
    source: str
    """Where the numbers come from."""


# --- what is not there yet, by its published size ---

SFT_ROWS = {"tatsu-lab/alpaca": (52_002, 100)}
"""Rows, and tokens of each with its template: its card gives 918 bytes a row, in which the text stands twice, the second time in a template of 190 characters."""
PAIRS = {"HuggingFaceH4/ultrafeedback_binarized": (61_135, 170, 315, 250)}
"""Pairs, and tokens of prompt, chosen and rejected: its card gives 6,636 bytes a row, which hold the prompt four times and the chosen answer twice."""
BENCHMARKS = {
    "arc_challenge": (1_172, 4, 37, 175, 0), "commonsense_qa": (1_221, 1, 45, 94, 0), "gsm8k": (1_319, 1, 194, 526, 256),
    "hellaswag": (10_042, 4, 97, 171, 0), "winogrande": (1_267, 2, 22, 38, 0),
}  # fmt: skip
"""Rows of the scored split, passes of a row, tokens of each with its answer, in the mean and at most (counted with SmolLM2's tokenizer), and tokens that are
generated at most."""


def sft_work(settings: params.Params, tokenized: Path | None, devices: int) -> Work:
    section, tokens_of = settings.sft, settings.tokenize.sft
    if tokenized is not None:
        train, held_out = (training.shards(tokenized, part).data.column("seq_lengths") for part in ("train", "held_out"))
        examples = pc.list_flatten(train).to_numpy().astype(float)
        rows = np.array([sum(lengths) for lengths in train.to_pylist()], float)
        measured, source = pc.sum(pc.list_flatten(held_out)).as_py(), f"{tokenized}: {len(examples):,} examples"
    else:
        count, mean, source = published(settings.data.sft, SFT_ROWS)
        examples = np.full(count - tokens_of.held_out, float(mean))
        rows = np.full(math.ceil(examples.sum() / tokens_of.max_length), float(tokens_of.max_length)) if tokens_of.packing else examples
        measured = tokens_of.held_out * mean
    steps = math.ceil(len(rows) * section.epochs / section.global_batch_size)
    seen = steps * section.global_batch_size / len(rows)
    largest = int(np.sort(rows)[-section.micro_batch_size :].sum())
    if tokenized is None and not tokens_of.packing:
        largest = section.micro_batch_size * tokens_of.max_length
    return Work(
        largest=Shape(1, largest, largest, masked=False),
        tokens=rows.sum() * seen,
        length=(examples**2).sum() / examples.sum(),
        micro_batches=steps * section.global_batch_size / section.micro_batch_size / devices,
        steps=steps,
        measured=measured * (2 + section.measurements),
        held=examples.sum() + measured,
        source=source,
    )


def dpo_work(settings: params.Params, tokenized: Path | None, devices: int, shared: bool) -> Work:
    section, tokens_of = settings.dpo, settings.tokenize.dpo
    if tokenized is not None:
        train, held_out = (training.shards(tokenized, part) for part in ("train", "held_out"))
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        drawn = pairs.lengths(training.batches(train, columns, section.steps, section.global_batch_size, settings.seed), shared)
        padded = drawn.reshape(-1, section.micro_batch_size).max(axis=1) * section.micro_batch_size
        every, rest = pairs.lengths(train, shared), pairs.lengths(held_out, shared)
        longest, source = int(every.max()), f"{tokenized}: {len(train):,} pairs"
        answers = sum(pc.sum(pc.list_value_length(train.data.column(name))).as_py() for name in columns[1:]) / every.sum()
    else:
        count, prompt, chosen, rejected, source = published(settings.data.preferences, PAIRS)
        one = chosen + rejected + (prompt + 1 if shared else 2 * prompt)
        padded = np.full(section.steps * section.global_batch_size // section.micro_batch_size, one * section.micro_batch_size)
        every, rest = np.full(count - tokens_of.held_out, one), np.full(tokens_of.held_out, one)
        # no pair is longer than max_length with its longer answer
        longest, answers = 2 * tokens_of.max_length - (prompt if shared else 0), (chosen + rejected) / one
    rows, length = (section.micro_batch_size, longest) if shared else (2 * section.micro_batch_size, longest // 2)
    return Work(
        largest=Shape(rows, length, int(rows * length * answers), masked=shared),
        tokens=float(padded.sum()),
        length=float((every.astype(float) ** 2).sum() / every.sum()),
        micro_batches=len(padded) / devices,
        steps=section.steps,
        measured=float(rest.sum() * (2 + section.measurements) + 2 * every[:512].sum()),
        held=float(every.sum() + rest.sum()),
        source=source,
    )


def published(data: params.SftData | params.PreferencesData, sizes: dict[str, tuple[int, ...]]) -> tuple:
    """Rows of the mixture, tokens as in `sizes`, and in words where they come from."""
    counts, tokens, names = [], [], []
    for name, entry in data.sources.items():
        repo = getattr(entry.source, "repo", None)
        if repo not in sizes:
            raise InputError(f"data: {name} is not tokenized yet and its size is not known; `dvc repro tokenize_sft tokenize_dpo` needs no GPU")
        rows, *each = sizes[repo]
        share = data.mix[name]
        counts.append(round(min(rows, share.limit or rows) * share.weight))
        tokens.append(each)
        names.append(repo)
    weighted = np.average(np.array(tokens, float), axis=0, weights=counts)
    return (sum(counts), *(round(value) for value in weighted), f"published sizes of {', '.join(names)}; `dvc repro tokenize_sft tokenize_dpo` counts them")


def seconds(cost: Cost, shape: Shape, tokens: float, length: float, micro_batches: float, machine: Machine, kind: Kind) -> tuple[float, float, float]:
    """FLOPs of `tokens`; seconds at the machine's utilization; seconds that starting the kernels of the micro-batches takes at least."""
    share = tokens / (shape.rows * shape.length)
    flops = share * (cost.matrices + cost.attention * length / shape.length)
    return flops, flops / (machine.flops * machine.utilization * machine.devices), micro_batches * cost.operations * kind.operation


@dataclass(frozen=True)
class Need:
    """Of one stage."""

    stage: str
    weights: float
    trained: float
    """Bytes of adapter, gradients and optimizer."""
    activations: float
    process: float
    steps: int
    tokens: float
    flops: float
    computing: float
    """Seconds."""
    starting: float
    """Seconds that its kernels take to be started, at least."""

    @property
    def memory(self) -> float:
        return self.weights + self.trained + self.activations + self.process


def needs(settings: params.Params, config: PreTrainedConfig, machine: Machine, tokenized: dict[str, Path | None]) -> tuple[list[Need], dict[str, Work], dict[str, int]]:
    """Of sft, reference, dpo and all of evaluate; what the first and third compute; and the numbers of weights."""
    model, lora, kind = settings.model, settings.lora, GPU if machine.gpu else CPU
    whole = tracing.policy(config, model, lora)
    counts = tracing.counts(whole)
    shared = pairs.can_share_prompts(config.get_text_config(), model.attention)
    work = {"sft": sft_work(settings, tokenized["sft"], machine.devices), "dpo": dpo_work(settings, tokenized["dpo"], machine.devices, shared)}
    width = 4 if lora.method == "full" or model.dtype == "float32" else 2
    quantized = counts["linear"] if model.quantization == "nf4" else 0
    weights = quantized * NF4 + (counts["frozen"] + (counts["trained"] if lora.method == "full" else 0) - quantized) * width
    # one layer's weights are unpacked while it computes
    unpacked = counts["largest"] * width if quantized else 0
    trained = counts["trained"] * ((0 if lora.method == "full" else 4) + GRADIENT + ADAM)
    in_parts = machine.devices > 1
    if in_parts and quantized:
        trained = counts["trained"] * (4 + (GRADIENT + ADAM) / machine.devices) + min(REDUCE_BUCKET, counts["trained"]) * GRADIENT
    elif in_parts:
        live = min(ZERO3_LIVE, counts["frozen"] + counts["trained"]) * width
        weights, trained = weights / machine.devices + live, trained / machine.devices
    found = []
    for stage, section in (("sft", settings.sft), ("dpo", settings.dpo)):
        own = work[stage]
        # TRL trains pairs without dropout
        used = lora if stage == "sft" else lora.model_copy(update={"dropout": 0.0})
        step = tracing.cost(config, model, used, own.largest, True, section.gradient_checkpointing)
        forward = tracing.cost(config, model, used, own.largest, False, False)
        flops, computing, starting = seconds(step, own.largest, own.tokens, own.length, own.micro_batches, machine, kind)
        more, longer, _ = seconds(forward, own.largest, own.measured, own.length, 0, machine, kind)
        found.append(Need(stage, weights, trained, step.peak * kind.held + unpacked, kind.process, own.steps, own.tokens, flops + more, computing + longer + kind.start, starting))
        if stage == "dpo":
            once = seconds(forward, own.largest, own.held, own.length, own.held / (own.largest.rows * own.largest.length) / machine.devices, machine, kind)
            adapter = 0 if lora.method == "full" else counts["trained"] * 4
            alone = weights if not in_parts or quantized else weights * machine.devices
            found.insert(1, Need("reference", alone, adapter, forward.peak * kind.held + unpacked, kind.process, 0, own.held, once[0], once[1] + kind.start, once[2]))
    found.append(evaluation(settings, config, machine, kind, found[1]))
    return found, work, counts


def evaluation(settings: params.Params, config: PreTrainedConfig, machine: Machine, kind: Kind, loaded: Need) -> Need:
    """Of all cells, one after the other on one device."""
    one = replace(machine, devices=1)
    total = [0.0, 0.0, 0.0, 0.0]
    longest = 1
    shape = Shape(1, 256, 256, masked=False)
    forward = tracing.cost(config, settings.model, settings.lora, shape, False, False)
    for name in settings.evaluate.benchmarks:
        if name not in BENCHMARKS:
            print(f"evaluate: {name} is not counted: its size is not known")
            continue
        benchmark = settings.benchmarks[name]
        rows, requests, each, most, generated = BENCHMARKS[name]
        rows, length = min(rows, benchmark.limit or rows), each * (benchmark.num_fewshot + 1)
        if generated:
            generated = benchmark.max_new_tokens or generated
        else:
            longest = max(longest, length - each + most)
        batches = rows * requests / settings.evaluate.batch_size
        tokens = rows * requests * (length + generated)
        found = seconds(forward, shape, tokens, length, batches * (1 + generated), one, kind)
        total = [sum(pair) for pair in zip(total, (tokens, found[0], found[1] + kind.start, found[2]), strict=True)]
    tokens, flops, computing, starting = (3 * value for value in total)
    # where nothing is generated, lm-eval asks for all logits, in the model's dtype, and takes their softmax in float32
    logits = settings.evaluate.batch_size * longest * config.get_text_config().vocab_size * ((4 if settings.model.dtype == "float32" else 2) + 4)
    return Need("evaluate", loaded.weights, loaded.trained, logits * kind.held, kind.process, 0, tokens, flops, computing, starting)
