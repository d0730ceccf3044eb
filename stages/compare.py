"""Set base, SFT and DPO side by side: scores, differences on the same rows, and what each stage brought.

Standard errors of differences are paired: the same rows are scored for both models, so only rows on which they differ count.
Under `clean` the same is counted again without rows that are in the raw training data.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from stages import InputError, command, params
from stages.records import read_json, read_parquet, write_json

MODELS = ("base", "sft", "dpo")
COMPARISONS = {"sft_vs_base": ("sft", "base"), "dpo_vs_sft": ("dpo", "sft"), "dpo_vs_base": ("dpo", "base")}


def run(benchmarks: list[str], metrics: Path, evals: Path, contamination: Path, summary: Path, plot: Path) -> None:
    record: dict[str, Any] = {"scores": {}, "differences": {}, "n": {}}
    clean: dict[str, Any] = {"scores": {}, "differences": {}, "n": {}}
    for name in benchmarks:
        found = {model: read_json(metrics / model / f"{name}.json") for model in MODELS}
        correct = {model: read_correct(evals / model / f"{name}.parquet") for model in MODELS}
        record["scores"][name] = {model: {"score": value["score"], "stderr": value["stderr"]} for model, value in found.items()}
        record["differences"][name] = compared(correct, name)
        record["n"][name] = found["base"]["n"]
        found_in_data = set(read_parquet(contamination / f"{name}.parquet")["doc_id"].to_pylist())
        rest = {model: {row: value for row, value in values.items() if row not in found_in_data} for model, values in correct.items()}
        clean["n"][name] = len(rest["base"])
        if clean["n"][name] > 1:
            clean["scores"][name] = {model: mean_of(list(values.values()), "score") for model, values in rest.items()}
            clean["differences"][name] = compared(rest, name)
    for part in (record, clean):
        for table in ("scores", "differences"):
            part[table] |= {"mean": averaged(list(part[table].values()))} if part[table] else {}
    record["share_of_gain"] = share_of_gain(record["differences"]["mean"])
    write_json(summary, record | {"clean": clean})
    write_json(plot, bars(record["scores"]))


def compared(correct: dict[str, dict[int, float]], name: str) -> dict[str, dict[str, float]]:
    return {label: paired(correct[a], correct[b], name) for label, (a, b) in COMPARISONS.items()}


def read_correct(file: Path) -> dict[int, float]:
    table = read_parquet(file)
    return dict(zip(table["doc_id"].to_pylist(), table["correct"].to_pylist(), strict=True))


def paired(first: dict[int, float], second: dict[int, float], name: str) -> dict[str, float]:
    """Mean of first minus second over the same rows, with its standard error."""
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise InputError(f"{name}: the models were scored on different rows (doc_id {odd[0]} and {len(odd) - 1} more); `dvc repro` scores them alike")
    return mean_of([first[key] - second[key] for key in sorted(first)], "difference")


def mean_of(values: list[float], key: str) -> dict[str, float]:
    """The mean of at least two values under `key`, with its standard error."""
    return {key: float(np.mean(values)), "stderr": float(np.std(values, ddof=1) / math.sqrt(len(values)))}


def averaged(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean over benchmarks, each with the same weight; their errors are independent."""
    return {
        label: {
            key: math.sqrt(sum(row[label][key] ** 2 for row in rows)) / len(rows) if key == "stderr" else sum(row[label][key] for row in rows) / len(rows)
            for key in rows[0][label]
        }
        for label in rows[0]
    }  # fmt: skip


def share_of_gain(mean: dict[str, dict[str, float]]) -> dict[str, float]:
    """What part of the gain in mean score SFT and DPO each brought; nothing where there is no gain to share."""
    total = mean["dpo_vs_base"]["difference"]
    if total <= 0:
        return {}
    return {"sft": mean["sft_vs_base"]["difference"] / total, "dpo": mean["dpo_vs_sft"]["difference"] / total}


def bars(scores: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    return [{"benchmark": name, "model": model, "label": f"{name} {model}", **value} for name, models in scores.items() for model, value in models.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("metrics", "evals", "contamination", "summary", "plot"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    benchmarks = params.load().evaluate.benchmarks
    run(benchmarks, arguments.metrics, arguments.evals, arguments.contamination, arguments.summary, arguments.plot)


if __name__ == "__main__":
    command(main)
