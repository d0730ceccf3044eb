"""The rows of `evals/<model>/<benchmark>.parquet`: what was asked, and what the model answered."""

import json
import math
from typing import Any

import pyarrow as pa

from reprotune import params
from reprotune.errors import InputError
from reprotune.evaluation.rows import Part

SAMPLE = pa.schema(
    {
        "doc_id": pa.int64(),
        "doc": pa.string(),
        "prompt": pa.string(),
        "choices": pa.list_(pa.string()),
        "log_probs": pa.list_(pa.float64()),
        "generation": pa.string(),
        "gold": pa.string(),
        "predicted": pa.string(),
        "correct": pa.float64(),
    }
)
"""`doc` is the benchmark's row as JSON; a task that generates has no choices and no log_probs."""


def sample_rows(
    samples: dict[str, list[dict[str, Any]]], parts: list[Part], benchmark: params.Benchmark
) -> list[dict[str, Any]]:
    """Rows of SAMPLE in the benchmark's order, from lm-eval's samples of each task."""
    metric, selection = benchmark.metric.split(",")
    rows = [
        sample_row(sample, part.numbers[sample["doc_id"]], metric)
        for part in parts
        for sample in samples[part.task]
        if sample["filter"] == selection
    ]
    return sorted(rows, key=lambda row: row["doc_id"])


def sample_row(sample: dict[str, Any], number: int, metric: str) -> dict[str, Any]:
    """One row of SAMPLE.

    Raises:
        InputError: a log-prob is not finite.
    """
    arguments = sample["arguments"]
    row = {
        "doc_id": number,
        "doc": json.dumps(sample["doc"], sort_keys=True, ensure_ascii=False),
        "gold": str(sample["target"]),
        "correct": float(sample[metric]),
    }
    if len(arguments) == 1:
        return row | {
            "prompt": arguments[0][0],
            "choices": None,
            "log_probs": None,
            "generation": sample["resps"][0][0],
            "predicted": str(sample["filtered_resps"][0]),
        }
    log_probs = [float(response[0][0]) for response in sample["resps"]]
    if not all(map(math.isfinite, log_probs)):
        raise InputError(
            f"row {number}: found log-probs of {log_probs}, expected finite numbers; the model's adapter or "
            "base is damaged"
        )
    contexts, continuations = zip(*arguments, strict=True)
    same_prompt = len(set(contexts)) == 1
    choices = continuations if same_prompt else [context + choice for context, choice in arguments]
    return row | {
        "prompt": contexts[0] if same_prompt else "",
        "choices": list(choices),
        "log_probs": log_probs,
        "generation": None,
        "predicted": str(log_probs.index(max(log_probs))),
    }
