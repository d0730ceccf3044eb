"""The protocol of a score: everything but the model's weights that can move it.

Scores of different protocols are not compared.
"""

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from transformers import GenerationConfig, PreTrainedTokenizerBase

from reprotune.evaluation.generation import IGNORED_SETTINGS, SAMPLING
from reprotune.evaluation.rows import row_count
from reprotune.params import Benchmark, Params
from reprotune.records import digest

Protocol = dict[str, Any]


def of_task(
    name: str, benchmark: Benchmark, seed: int, scored: Path, examples: Path, indices: list[int],
    versions: Iterable[Any], requests: list[list[tuple[str, Any]]],
) -> Protocol:  # fmt: skip
    """What the benchmark asks, and how.

    Args:
        scored, examples: files of the scored rows and of the few-shot examples.
        indices: the rows that are scored.
        versions: of lm-eval's tasks.
        requests: for each document, the arguments of its requests: a context, and its continuation or how to
            generate one.
    """
    arguments = requests[0][0][1]
    generation = arguments if isinstance(arguments, dict) else None
    if generation is not None and generation.get("do_sample"):
        generation = generation | {"seed": seed}
    return {
        "task": f"{benchmark.task or name} {', '.join(sorted({str(number) for number in versions}))}",
        "lm_eval": version("lm_eval"),
        "metric": benchmark.metric,
        "num_fewshot": benchmark.num_fewshot,
        "data": short(digest(file) for file in ([scored, examples] if benchmark.num_fewshot else [scored])),
        "rows": f"{len(indices)} of {row_count(scored)}, {short(indices)}",
        "generation": "none" if generation is None else json.dumps(generation, sort_keys=True),
        "prompts": short(requests),
    }


def of_model(settings: Params, template: Path, end_of_turn: str, chat: bool) -> Protocol:
    """How the model is asked and computed.

    Args:
        template: the file of `model.chat_template`.
        end_of_turn: the token that ends a turn of it.
        chat: whether prompts are turns of a chat.
    """
    model, backend = settings.model, settings.evaluate.backend
    return {
        "chat_template": f"{model.chat_template} {digest(template)[:12]}" if chat else "none",
        "end_of_turn": end_of_turn,
        "backend": f"{backend} {version(backend)}",
        "dtype": model.dtype,
        "quantization": model.quantization,
        "attention": model.attention,
    }


def of_decoding(
    asked: Protocol, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, backend: str
) -> Protocol:
    """What the model's generation config adds to a request that generates.

    Args:
        asked: what `of_task` gave.
    """
    if asked["generation"] == "none":
        return {"decoding": "none"}
    arguments = json.loads(asked["generation"])
    ignored = IGNORED_SETTINGS if arguments.get("do_sample") else IGNORED_SETTINGS | SAMPLING
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in ignored}
    if backend == "vllm":
        # lm-eval passes it nothing else of the base's
        settings = {}
    # a base may name a number that its tokenizer has no token for
    tokens = zip(config.eos_token_id, tokenizer.convert_ids_to_tokens(config.eos_token_id), strict=True)
    ends = sorted(str(number) if token is None else token for number, token in tokens)
    return {"decoding": json.dumps({"ends": ends, **settings}, sort_keys=True)}


def record(protocol: Protocol) -> dict[str, Any]:
    """A protocol for a metrics file: one hash of it, and its parts in words."""
    parts = sorted(protocol.items())
    return {"protocol": short(parts), "protocol_parts": [f"{part}: {value}" for part, value in parts]}


def short(values: Iterable[Any]) -> str:
    """Twelve hex digits of a hash of JSON values."""
    return xxhash.xxh3_64_hexdigest(json.dumps(list(values)).encode())[:12]
