"""The content of the report's sample browser: rows of each benchmark with the answers of all models."""

from pathlib import Path
from typing import Any

from reprotune.comparison.scores import COMPARISONS, MODELS, samples_file
from reprotune.records import read_parquet
from reprotune.report.names import benchmark_name, comparison_names, model_names
from reprotune.report.translation import say

MAX_ROWS = 50
"""Rows of a benchmark for each change between two models, and for all rows."""
MAX_CHARACTERS = 4000
"""Of a text; the rest is cut."""

Sample = dict[str, Any]
"""A scored row, as `evaluate` writes it."""
ModelSamples = dict[str, dict[int, Sample]]
"""The samples of one benchmark, by model and `doc_id`."""


def read(benchmarks: list[str], evals: Path) -> dict[str, ModelSamples]:
    """The samples of all cells, by benchmark."""
    return {
        name: {
            model: {row["doc_id"]: row for row in read_parquet(samples_file(name, model, evals)).to_pylist()}
            for model in MODELS
        }
        for name in benchmarks
    }


def chance(samples: dict[str, ModelSamples]) -> dict[str, float]:
    """The score of guessing on each benchmark whose rows have choices."""
    choices = {
        name: [len(row["choices"]) for row in models["base"].values() if row["choices"] is not None]
        for name, models in samples.items()
    }
    return {
        name: sum(1 / count for count in counts) / len(counts) for name, counts in choices.items() if counts
    }


def page(samples: dict[str, ModelSamples]) -> dict[str, Any]:
    """The data of `page.js`: benchmarks with their samples, changes to filter by, and the words it shows."""
    changes = [{"name": "all", "label": say("all rows")}, *changes_between_models()]
    words = {
        "samples": say("Samples"),
        "benchmark": say("Benchmark"),
        "change": say("Change"),
        "containing": say("Containing"),
        "previous": say("← Previous"),
        "next": say("Next →"),
        "none": say("No such row"),
        "row": say("Row"),
        "prompt": say("Prompt"),
        "gold": say("Expected"),
        "here": say("here, of"),
    }
    return {
        "benchmarks": [benchmark_page(name, models, changes) for name, models in samples.items()],
        "changes": changes,
        "models": list(model_names().values()),
        "words": words,
    }


def changes_between_models() -> list[dict[str, Any]]:
    """The rows that turned right, and those that turned wrong, in each comparison.

    `of` has the positions of the two models; `better` says whether the first scores higher than the second.
    """
    changes = []
    for label, name in comparison_names().items():
        positions = [MODELS.index(model) for model in COMPARISONS[label]]
        for suffix, text, better in (
            ("better", say("wrong → right"), True),
            ("worse", say("right → wrong"), False),
        ):
            changes.append(
                {"name": f"{label}_{suffix}", "label": f"{name}: {text}", "of": positions, "better": better}
            )
    return changes


def benchmark_page(benchmark: str, models: ModelSamples, changes: list[dict[str, Any]]) -> dict[str, Any]:
    """The samples of one benchmark: the first MAX_ROWS of each change, and how many there are of each."""
    tables = [models[model] for model in MODELS]
    base = models["base"]
    matching = {
        change["name"]: [row for row in sorted(base) if matches(change, [table[row] for table in tables])]
        for change in changes
    }
    taken = sorted({row for rows in matching.values() for row in rows[:MAX_ROWS]})
    samples = [
        {
            "row": row,
            "prompt": cut(base[row]["prompt"], keep_end=True),
            "gold": cut(expected(base[row])),
            "answers": [answer(table[row]) for table in tables],
        }
        for row in taken
    ]
    return {
        "name": benchmark,
        "label": benchmark_name(benchmark),
        "counts": {change: len(rows) for change, rows in matching.items()},
        "samples": samples,
    }


def matches(change: dict[str, Any], samples: list[Sample]) -> bool:
    """Whether a row belongs to a change.

    Args:
        samples: the row's, one for each model.
    """
    if "of" not in change:
        return True
    first, second = (samples[position]["correct"] for position in change["of"])
    return first > second if change["better"] else first < second


def expected(sample: Sample) -> str:
    """The right answer; its text where `gold` is the number of a choice."""
    gold, choices = sample["gold"], [choice.strip() for choice in sample["choices"] or ()]
    return choices[int(gold)] if choices and gold.isdecimal() and gold not in choices else gold


def answer(sample: Sample) -> Sample:
    """A model's generation, or its choices with their log-probs."""
    if sample["choices"] is None:
        return {"correct": sample["correct"], "text": cut(sample["generation"])}
    choices = [
        [cut(choice), f"{log_prob:.2f}"]
        for choice, log_prob in zip(sample["choices"], sample["log_probs"], strict=True)
    ]
    return {"correct": sample["correct"], "choices": choices, "chosen": int(sample["predicted"])}


def cut(text: str, keep_end: bool = False) -> str:
    """The first MAX_CHARACTERS of a text, or the last.

    A prompt keeps its end, because it starts with few-shot examples.
    """
    left = len(text) - MAX_CHARACTERS
    if left <= 0:
        return text
    omitted = say("{count:,} characters", count=left)
    if keep_end:
        return f"[… {omitted}]\n{text[-MAX_CHARACTERS:]}"
    return f"{text[:MAX_CHARACTERS]}\n[{omitted} …]"
