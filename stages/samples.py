"""What the report's sample browser has: rows of each benchmark with the answers of all models side by side. All of it is text, long texts are cut."""

from pathlib import Path
from typing import Any

from stages.figures import comparisons, labels, pretty
from stages.language import say
from stages.records import read_parquet

MOST = 50
"""Rows of a benchmark for each change between two models, and so many of all."""
LONGEST = 4000
"""Characters of a text."""

Sample = dict[str, Any]


def read(names: list[str], evals: Path) -> dict[str, dict[str, dict[int, Sample]]]:
    """Of each benchmark and model, the scored rows by their numbers."""
    return {name: {model: {row["doc_id"]: row for row in read_parquet(evals / model / f"{name}.parquet").to_pylist()} for model in labels()} for name in names}


def chance(found: dict[str, dict[str, dict[int, Sample]]]) -> dict[str, float]:
    """What guessing among the choices would score on the rows of each benchmark that has choices."""
    choices = {name: [len(row["choices"]) for row in models["base"].values() if row["choices"] is not None] for name, models in found.items()}
    return {name: sum(1 / count for count in counts) / len(counts) for name, counts in choices.items() if counts}


def page(found: dict[str, dict[str, dict[int, Sample]]]) -> dict[str, Any]:
    """What the page's script shows."""
    models, changes = list(labels()), [{"name": "all", "label": say("all rows")}]
    for label, text in comparisons().items():
        of = [models.index(model) for model in label.split("_vs_")]
        changes += [
            {"name": f"{label}_better", "label": f"{text}: {say('wrong → right')}", "of": of, "better": True},
            {"name": f"{label}_worse", "label": f"{text}: {say('right → wrong')}", "of": of, "better": False},
        ]
    words = {
        "samples": say("Samples"), "benchmark": say("Benchmark"), "change": say("Change"), "containing": say("Containing"), "previous": say("← Previous"),
        "next": say("Next →"), "none": say("No such row"), "row": say("Row"), "prompt": say("Prompt"), "gold": say("Expected"), "here": say("here, of"),
    }  # fmt: skip
    return {"benchmarks": [of_benchmark(name, rows, changes) for name, rows in found.items()], "changes": changes, "models": list(labels().values()), "words": words}


def of_benchmark(name: str, models: dict[str, dict[int, Sample]], changes: list[dict[str, Any]]) -> dict[str, Any]:
    tables = list(models.values())
    rows = sorted(tables[0])

    def changed(row: int, change: dict[str, Any]) -> bool:
        if "of" not in change:
            return True
        one, other = (tables[number][row]["correct"] for number in change["of"])
        return one > other if change["better"] else one < other

    by_change = {change["name"]: [row for row in rows if changed(row, change)] for change in changes}
    taken = sorted({row for found in by_change.values() for row in found[:MOST]})
    samples = [
        {"row": row, "prompt": cut(tables[0][row]["prompt"], last=True), "gold": cut(expected(tables[0][row])), "answers": [answer(table[row]) for table in tables]} for row in taken
    ]
    return {"name": name, "label": pretty(name), "counts": {change: len(found) for change, found in by_change.items()}, "samples": samples}


def expected(sample: Sample) -> str:
    """The right answer as it stands among the choices, where the task has its number alone."""
    gold, choices = sample["gold"], [choice.strip() for choice in sample["choices"] or ()]
    return choices[int(gold)] if choices and gold.isdecimal() and gold not in choices else gold


def answer(sample: Sample) -> Sample:
    if sample["choices"] is None:
        return {"correct": sample["correct"], "text": cut(sample["generation"])}
    choices = [[cut(choice), f"{log_prob:.2f}"] for choice, log_prob in zip(sample["choices"], sample["log_probs"], strict=True)]
    return {"correct": sample["correct"], "choices": choices, "chosen": int(sample["predicted"])}


def cut(text: str, last: bool = False) -> str:
    """The beginning of a long text, or its end, as of a prompt, which begins with examples."""
    left = len(text) - LONGEST
    if left <= 0:
        return text
    omitted = say("{count:,} characters", count=left)
    return f"[… {omitted}]\n{text[-LONGEST:]}" if last else f"{text[:LONGEST]}\n[{omitted} …]"
