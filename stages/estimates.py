"""How much memory and time the stages that compute with the model need, for params and devices that are given.

Weights, activations and arithmetic are counted on the model itself, which runs by its shapes alone (stages/tracing.py). Rows that are tokenized already
are counted one by one, others taken by their published sizes.
"""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedConfig

from stages import InputError, pairs, params, tracing, training
from stages.attention import Segment, can_attend_by_segment
from stages.modeling import LOGITS
from stages.templating import IGNORED
from stages.tracing import Cost, Shape

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight: 4 bits, a byte for each block of 64, 4 bytes for each 256 blocks (https://arxiv.org/abs/2305.14314, double quantization)."""
WEIGHT, GRADIENT, ADAM = 4, 4, 8
"""Bytes a trained weight: all is in float32, and Adam keeps two moments."""
ZERO3_LIVE = 10**9
"""Weights that DeepSpeed's ZeRO-3 holds gathered at most, its stage3_max_live_parameters."""
TRACED_TEXTS = 8
"""Examples of a micro-batch, each attended to by itself, that are traced at most: more of them take longer to trace, and start more kernels than are counted."""
REDUCE_BUCKET = 5 * 10**8
"""Gradients for which DeepSpeed has a buffer, to sum them over devices: its reduce_bucket_size."""


@dataclass(frozen=True)
class Machine:
    name: str
    devices: int
    memory: float
    """Bytes of one device."""
    flops: float
    """A second, of one device, in model.dtype; nan where that is not known."""
    gpu: bool
    utilization: float
    """Share of `flops` that a run reaches."""


@dataclass(frozen=True)
class Kind:
    """Of GPUs, of which `operation` was measured on one H200, and of CPUs, as `python -m perf.preflight` measured it on two cores."""

    process: float
    """Bytes that a process holds before it has a model."""
    start: float
    """Seconds until a stage computes: libraries, and the model."""
    operation: float
    """Seconds that starting a kernel takes, with the Python around it."""
    held: float
    """Bytes that the allocator holds for each byte of activations that is alive."""
    utilization: float


GPU = Kind(process=0.6 * GIB, start=30, operation=4e-5, held=1.0, utilization=0.4)
CPU = Kind(process=0.65 * GIB, start=7.5, operation=0, held=1.55, utilization=0.6)


@dataclass(frozen=True)
class Work:
    """What a training stage is to compute, over all devices, padding included."""

    largest: Shape
    """Its largest micro-batch."""
    measuring: Shape
    """The largest one of rows that are measured, without a backward pass."""
    tokens: float
    length: float
    """That a token's attention sees, in the mean over tokens."""
    micro_batches: float
    steps: int
    measured: float
    """Tokens of rows that are measured."""
    held: float
    """Tokens that are tokenized, computed once each."""
    source: str
    """Where the numbers come from."""


# --- what is not there yet, by its published size ---

SFT_ROWS = {"tatsu-lab/alpaca": (52_002, 100, 65)}
"""Rows, and of each the tokens with its template and those of its answer: its card gives 918 bytes a row, in which the text stands twice, the second time
in a template of 190 characters."""
PAIRS = {"HuggingFaceH4/ultrafeedback_binarized": (61_135, 170, 315, 250)}
"""Pairs, and tokens of prompt, chosen and rejected: its card gives 6,636 bytes a row, which hold the prompt four times and the chosen answer twice."""
BENCHMARKS = {
    "arc_challenge": (1_172, 4, 31, 6, 175, 0), "commonsense_qa": (1_221, 5, 44, 1, 94, 0), "gsm8k": (1_319, 1, 67, 127, 193, 256),
    "hellaswag": (10_042, 4, 50, 30, 155, 0), "winogrande": (1_267, 2, 17, 6, 39, 0),
}  # fmt: skip
"""Rows of the scored split, answers of a row, tokens of a question and of an answer in the mean and of both at most (counted with SmolLM2's tokenizer), and tokens
that are generated at most."""


def published(data: params.SftData | params.PreferencesData, sizes: dict[str, tuple[int, ...]], held_out: int) -> tuple[float, list[float], str]:
    """Rows of the mixture that are trained on, a row's tokens as in `sizes`, and in words where they come from."""
    rows, weights, tokens, names = [], [], [], []
    for name, entry in data.sources.items():
        repo = entry.source.repo if isinstance(entry.source, params.HubSource) else None
        if repo not in sizes:
            raise InputError(f"data: {name} is not tokenized with these params yet, and its size is not known; `dvc repro tokenize_sft tokenize_dpo` needs no GPU")
        count, *each = sizes[repo]
        rows.append(min(count, data.mix[name].limit or count))
        weights.append(data.mix[name].weight)
        tokens.append(each)
        names.append(repo)
    if held_out >= sum(rows):
        raise InputError(f"tokenize: held_out: found {held_out}, expected fewer than the {sum(rows)} rows that the mixture takes")
    trained = np.array(rows) * (1 - held_out / sum(rows)) * np.array(weights)
    mean = [float(value) for value in np.average(np.array(tokens, float), axis=0, weights=trained)]
    return float(trained.sum()), mean, f"published sizes of {', '.join(names)}; `dvc repro tokenize_sft tokenize_dpo` counts them"


def sft_work(settings: params.Params, tokenized: Path | None, devices: int, by_segment: bool) -> Work:
    section, tokens_of = settings.sft, settings.tokenize.sft
    if tokenized is not None:
        train, held_out = (training.shards(tokenized, part).data for part in ("train", "held_out"))
        examples = pc.list_flatten(train.column("seq_lengths")).to_numpy().astype(float)
        rows = pc.list_value_length(train.column("input_ids")).to_numpy().astype(float)
        labels = pc.mean(pc.not_equal(pc.list_flatten(train.column("labels")), IGNORED)).as_py()
        measured, source = pc.sum(pc.list_value_length(held_out.column("input_ids"))).as_py(), f"{tokenized}: {len(examples):,} examples"
        largest = np.sort(rows)[-section.micro_batch_size :].sum()
    else:
        count, (mean, answer), source = published(settings.data.sft, SFT_ROWS, tokens_of.held_out)
        labels, mean = answer / mean, min(mean, tokens_of.max_length)
        examples = np.full(max(1, round(count)), mean)
        rows = np.full(math.ceil(examples.sum() / tokens_of.max_length), float(tokens_of.max_length)) if tokens_of.packing else examples
        measured, largest = tokens_of.held_out * mean, section.micro_batch_size * tokens_of.max_length
    steps = math.ceil(len(rows) * section.epochs / section.global_batch_size)
    if by_segment:
        seen, texts = examples, min(TRACED_TEXTS, max(1, round(largest / examples.mean())))
    else:
        # all of the rows that are computed at once
        seen, texts = rows * section.micro_batch_size, 1
    text = int(largest / texts)
    shape = Shape(1, text * texts, int(text * texts * labels), (Segment(text, 0),) * texts, texts)
    return Work(
        largest=shape,
        measuring=shape,
        tokens=rows.mean() * steps * section.global_batch_size,
        length=(seen**2).sum() / seen.sum(),
        micro_batches=steps * section.global_batch_size / section.micro_batch_size / devices,
        steps=steps,
        measured=measured * (2 + section.measurements),
        held=examples.sum() + measured,
        source=source,
    )


def dpo_work(settings: params.Params, tokenized: Path | None, devices: int, shared: bool) -> Work:
    """With `shared` prompts a pair is one row, otherwise two."""
    section, tokens_of = settings.dpo, settings.tokenize.dpo
    rows = 1 if shared else 2
    if tokenized is not None:
        train, held_out = (training.shards(tokenized, part) for part in ("train", "held_out"))
        drawn = training.batches(train, ["prompt_ids", "chosen_ids", "rejected_ids"], section.steps, section.global_batch_size, settings.seed)
        every, rest = (pairs.lengths(one, shared) for one in (train, held_out))
        computed = pairs.computed(drawn, section.micro_batch_size, shared)
        answers = sum(len(pc.list_flatten(train.data.column(name))) for name in ("chosen_ids", "rejected_ids")) / every.sum()
        longest, source = every.max() / rows, f"{tokenized}: {len(every):,} pairs"
    else:
        count, sizes, source = published(settings.data.preferences, PAIRS, tokens_of.held_out)
        # prompt and longer answer have max_length tokens at most
        longest = (1 + shared) * tokens_of.max_length
        one = min(pairs.length(*sizes, shared), rows * longest)
        every, rest, computed = (np.full(max(1, round(number)), one) for number in (count, tokens_of.held_out, section.steps * section.global_batch_size))
        answers = min(1.0, sum(sizes[1:]) / one)
    branch = int(longest * answers / 2)
    segments = (Segment(int(longest) - branch, 0), Segment(branch, int(longest) - 2 * branch))

    def shape(pairs_at_once: int) -> Shape:
        labelled = int(rows * pairs_at_once * longest * answers)
        if shared:
            return Shape(1, pairs_at_once * int(longest), labelled, segments * pairs_at_once, pairs_at_once)
        return Shape(rows * pairs_at_once, int(longest), labelled)

    return Work(
        largest=shape(section.micro_batch_size),
        measuring=shape(settings.reference.batch_size),
        tokens=float(computed.sum()),
        length=float((every.astype(float) ** 2).sum() / every.sum()) / rows,
        micro_batches=len(computed) / section.micro_batch_size / devices,
        steps=section.steps,
        measured=float(rest.sum() * (2 + section.measurements) + 2 * every[: pairs.MEASURED].sum()),
        held=float(every.sum() + rest.sum()),
        source=source,
    )


def seconds(cost: Cost, shape: Shape, tokens: float, length: float, micro_batches: float, machine: Machine, kind: Kind) -> tuple[float, float, float]:
    """FLOPs of `tokens`; seconds at the machine's utilization; seconds that starting the kernels of the micro-batches takes."""
    share = tokens / (shape.rows * shape.length)
    flops = share * (cost.matrices + cost.attention * length * shape.texts / shape.length)
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
    loading: float
    """Bytes before the weights are dealt out to devices."""
    steps: int
    tokens: float
    flops: float
    computing: float
    """Seconds."""
    starting: float
    """Seconds that its kernels take to be started."""

    @property
    def memory(self) -> float:
        return max(self.weights + self.trained + self.activations, self.loading) + self.process


def needs(settings: params.Params, config: PreTrainedConfig, machine: Machine, tokenized: dict[str, Path | None]) -> tuple[list[Need], dict[str, Work], dict[str, int]]:
    """Of sft, reference, dpo and all of evaluate; what the first and third compute; and the numbers of weights."""
    model, lora, kind, devices = settings.model, settings.lora, GPU if machine.gpu else CPU, machine.devices
    full = lora.method == "full"
    counts = tracing.counts(tracing.policy(config, model, lora))
    quantized = counts["linear"] if model.quantization == "nf4" else 0
    width = 4 if model.dtype == "float32" else 2

    def held(width: int) -> float:
        return quantized * NF4 + (counts["frozen"] + full * counts["trained"] - quantized) * width

    whole, adapter = held(4 if full else width), 0 if full else counts["trained"] * WEIGHT
    # one layer's weights are unpacked while it computes
    unpacked = counts["largest"] * width if quantized else 0
    weights, trained = whole, adapter + counts["trained"] * (GRADIENT + ADAM)
    if devices > 1 and quantized:
        # ZeRO-2 keeps a copy of what it updates
        trained = adapter + counts["trained"] * (WEIGHT + GRADIENT + ADAM) / devices + REDUCE_BUCKET * GRADIENT
    elif devices > 1:
        live = min(ZERO3_LIVE, counts["frozen"] + counts["trained"]) * (4 if full else width)
        weights, trained = whole / devices + live, trained / devices + REDUCE_BUCKET * GRADIENT
    text = copy.deepcopy(config.get_text_config())
    text._attn_implementation = model.attention
    shared = pairs.can_share_prompts(text)
    work = {"sft": sft_work(settings, tokenized["sft"], devices, can_attend_by_segment(text)), "dpo": dpo_work(settings, tokenized["dpo"], devices, shared)}
    found, forwards = {}, {}
    for stage, own in work.items():
        section = getattr(settings, stage)
        # TRL trains pairs without dropout
        used = lora if stage == "sft" else lora.model_copy(update={"dropout": 0.0})
        step = tracing.cost(config, model, used, own.largest, True, section.gradient_checkpointing)
        forward = forwards[stage] = tracing.cost(config, model, used, own.measuring, False, False)
        flops, computing, starting = seconds(step, own.largest, own.tokens, own.length, own.micro_batches, machine, kind)
        more, longer, _ = seconds(forward, own.measuring, own.measured, own.length, 0, machine, kind)
        activations = max(step.peak, forward.peak) * kind.held + unpacked
        found[stage] = Need(
            stage, weights, trained, activations, kind.process, whole + adapter, own.steps, own.tokens, flops + more, computing + longer + kind.start, starting
        )
    own, forward = work["dpo"], forwards["dpo"]
    batches = own.held / (own.measuring.rows * own.measuring.texts * own.length) / devices
    flops, computing, starting = seconds(forward, own.measuring, own.held, own.length, batches, machine, kind)
    activations = forward.peak * kind.held + unpacked
    reference = Need("reference", whole, adapter, activations, kind.process, 0, 0, own.held, flops, computing + kind.start, starting)
    if quantized and (in_type := (counts["frozen"] + full * counts["trained"]) * width) <= machine.memory / 2:
        # scoring unpacks all of them, as modeling.fits_unpacked says
        scored = evaluation(settings, config, machine, kind, in_type, adapter, 0)
    else:
        scored = evaluation(settings, config, machine, kind, held(width), adapter, unpacked)
    return [found["sft"], reference, found["dpo"], scored], work, counts


def evaluation(settings: params.Params, config: PreTrainedConfig, machine: Machine, kind: Kind, weights: float, adapter: float, unpacked: float) -> Need:
    """Of all cells, one after the other on one device."""
    one = replace(machine, devices=1)
    named = {name: (settings.benchmarks[name], *BENCHMARKS[name]) for name in settings.evaluate.benchmarks if name in BENCHMARKS}
    text = config.get_text_config()
    width = 4 if settings.model.dtype == "float32" else 2
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    work = []
    for benchmark, rows, answers, question, answer, most, generated in named.values():
        rows, begins = min(rows, benchmark.limit or rows), (question + answer) * benchmark.num_fewshot + question
        generated = (benchmark.max_new_tokens or generated) if generated else 0
        computed, scored = (begins, 1) if generated else (begins + answers * answer, answers * answer)
        longest = begins - question + most
        held = int(max(longest, min(rows * computed, max(settings.evaluate.batch_tokens, 4 * longest))))
        work.append((rows, computed, scored, held, longest, generated))
    # what is computed for a token depends little on the benchmark: the largest batch stands for all
    _, computed, scored, held, *_ = max(work, key=lambda one: one[3])
    texts = min(TRACED_TEXTS, max(1, held // computed))
    branch = held // texts * scored // computed
    segments = tuple(segment for segment in (Segment(held // texts - branch, 0), Segment(branch, held // texts - branch)) if segment.length)
    shape = Shape(1, held // texts * texts, 1, segments * texts, texts)
    forward = tracing.cost(config, settings.model, settings.lora, shape, False, False)
    peak, total = 0.0, [0.0, 0.0, 0.0, 0.0]
    for rows, computed, scored, held, longest, generated in work:
        at_once = min(settings.evaluate.batch_texts, rows)
        # what the head gives, its float32 and the exponentials of that
        logits = min(held / computed * scored * text.vocab_size, LOGITS) * (8 if width == 4 else 2 + 8)
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * at_once * (longest + generated) * width
        peak = max(peak, forward.forward * held / shape.length + logits + (cache if generated else 0))
        tokens = rows * (computed + generated)
        flops, computing, starting = seconds(forward, shape, tokens, computed, rows * computed / held + rows * generated / at_once, one, kind)
        in_head = 2 * rows * (scored + generated) * text.hidden_size * text.vocab_size
        more = (tokens, flops + in_head, computing + in_head / (one.flops * one.utilization) + kind.start, starting)
        total = [sum(pair) for pair in zip(total, more, strict=True)]
    tokens, flops, computing, starting = (3 * value for value in total)
    return Need("evaluate", weights, adapter, peak * kind.held + unpacked, kind.process, 0, 0, tokens, flops, computing, starting)
