"""The need of evaluate: all its cells, one after the other on one device."""

from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedConfig

from reprotune import params
from reprotune.comparison.scores import MODELS
from reprotune.evaluation.batching import MAX_LOGITS, token_limit
from reprotune.model.attention import Segment
from reprotune.planning import tracing
from reprotune.planning.costs import Need, bytes_per_weight, time
from reprotune.planning.devices import Machine
from reprotune.planning.published import BENCHMARKS, BenchmarkSize
from reprotune.planning.tracing import Cost, Shape
from reprotune.planning.workload import TRACED_EXAMPLES


class Scored(NamedTuple):
    """What a benchmark asks of a model."""

    rows: int
    computed: int
    """Tokens that are computed for a row, on average, with a shared prefix once."""
    predicted: int
    """Tokens of a row for which the LM head computes logits."""
    batch: int
    """Tokens of a batch."""
    longest: int
    """Tokens of the longest request."""
    generated: int
    """Tokens that are generated for a row at most."""


def need(
    settings: params.Params,
    config: PreTrainedConfig,
    machine: Machine,
    weights: float,
    adapter: float,
    dequantized: float,
) -> Need:
    """
    Args:
        weights, adapter, dequantized: bytes, as in `needs.Weights`.
    """
    alone = replace(machine, devices=1)
    benchmarks = [
        scored(settings.benchmarks[name], BENCHMARKS[name], settings.evaluate.batch_tokens)
        for name in settings.evaluate.benchmarks
        if name in BENCHMARKS
    ]
    # a token costs about the same in every benchmark: the largest batch is traced for all
    shape = shape_of(max(benchmarks, key=lambda benchmark: benchmark.batch))
    forward = tracing.cost(config, settings.model, settings.lora, shape, False, False)
    peak = max(peak_bytes(settings, config, benchmark, forward, shape) for benchmark in benchmarks)
    works = (work(settings, config, benchmark, forward, shape, alone) for benchmark in benchmarks)
    tokens, flops, computing, starting = (len(MODELS) * sum(column) for column in zip(*works, strict=True))
    return Need(
        stage="evaluate",
        weights=weights,
        trained=adapter,
        activations=peak * machine.kind.held + dequantized,
        process=machine.kind.process,
        loading=0,
        steps=0,
        tokens=tokens,
        flops=flops,
        computing=computing,
        starting=starting,
    )


def scored(benchmark: params.Benchmark, size: BenchmarkSize, batch_tokens: int) -> Scored:
    rows = min(size.rows, benchmark.limit or size.rows)
    prompt = (size.question + size.answer) * benchmark.num_fewshot + size.question
    longest = prompt - size.question + size.longest
    if size.generated:
        computed, predicted = prompt, 1
    else:
        computed, predicted = prompt + size.answers * size.answer, size.answers * size.answer
    return Scored(
        rows=rows,
        computed=computed,
        predicted=predicted,
        batch=int(max(longest, min(rows * computed, token_limit(batch_tokens, longest)))),
        longest=longest,
        generated=(benchmark.max_new_tokens or size.generated) if size.generated else 0,
    )


def shape_of(benchmark: Scored) -> Shape:
    """A batch as a micro-batch of rows: a prompt, and all its answers as one continuation."""
    examples = min(TRACED_EXAMPLES, max(1, benchmark.batch // benchmark.computed))
    length = benchmark.batch // examples
    branch = length * benchmark.predicted // benchmark.computed
    both = (Segment(length - branch, 0), Segment(branch, length - branch))
    segments = tuple(segment for segment in both if segment.length)
    return Shape(1, length * examples, 1, segments * examples, examples)


def peak_bytes(
    settings: params.Params, config: PreTrainedConfig, benchmark: Scored, forward: Cost, shape: Shape
) -> float:
    """Activations, logits and KV cache of the largest batch.

    Args:
        forward: cost of a forward pass on `shape`.
    """
    text, dtype = config.get_text_config(), settings.model.dtype
    layers = forward.forward * benchmark.batch / shape.length
    cache = cache_bytes(text, dtype, benchmark, slots(settings, benchmark)) if benchmark.generated else 0
    return layers + logit_bytes(text, dtype, benchmark) + cache


def work(
    settings: params.Params, config: PreTrainedConfig, benchmark: Scored, forward: Cost, shape: Shape,
    machine: Machine,
) -> tuple[float, float, float, float]:  # fmt: skip
    """Tokens, FLOPs, seconds of computing and seconds of launching kernels, for one model.

    Args:
        forward: cost of a forward pass on `shape`.
    """
    text, rows = config.get_text_config(), benchmark.rows
    tokens = rows * (benchmark.computed + benchmark.generated)
    prompt_passes = rows * benchmark.computed / benchmark.batch
    decoding_passes = rows * benchmark.generated / slots(settings, benchmark)
    passes = prompt_passes + decoding_passes
    took = time(forward, shape, tokens, benchmark.computed, passes, machine)
    head = 2 * rows * (benchmark.predicted + benchmark.generated) * text.hidden_size * text.vocab_size
    computing = took.computing + head / machine.reached_flops + machine.kind.start
    return tokens, took.flops + head, computing, took.starting


def slots(settings: params.Params, benchmark: Scored) -> int:
    """Sequences that are generated together."""
    return min(settings.evaluate.batch_texts, benchmark.rows)


def logit_bytes(text: PreTrainedConfig, dtype: str, benchmark: Scored) -> float:
    """A batch's logits in model.dtype, a float32 copy where that is another type, and their exponentials."""
    logits = min(benchmark.batch / benchmark.computed * benchmark.predicted * text.vocab_size, MAX_LOGITS)
    return logits * (4 + 4 if dtype == "float32" else bytes_per_weight(dtype) + 4 + 4)


def cache_bytes(text: PreTrainedConfig, dtype: str, benchmark: Scored, slots: int) -> int:
    """The KV cache of sequences that are generated together."""
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = slots * (benchmark.longest + benchmark.generated)
    return 2 * text.num_hidden_layers * text.num_key_value_heads * width * tokens * bytes_per_weight(dtype)
