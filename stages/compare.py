"""Set base, SFT and DPO side by side: scores, differences on the same rows, and what each stage brought.

Standard errors of differences are paired: the same rows are scored for both models, so only rows on which they differ count.
`metrics/summary.json` has the means as numbers, which `dvc metrics` shows, and the tables behind them as lists, which it leaves out:
`all`, an entry a benchmark and one for their mean, and `clean`, the same without rows that are in the raw training data; there a benchmark
with fewer than two rows left has no scores, and no part in the mean.
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
    tables: dict[str, list[dict[str, Any]]] = {"all": [], "clean": []}
    for name in benchmarks:
        found = {model: read_json(metrics / model / f"{name}.json") for model in MODELS}
        correct = {model: read_correct(evals / model / f"{name}.parquet", found[model]["n"]) for model in MODELS}
        scores = {model: {"score": value["score"], "stderr": value["stderr"]} for model, value in found.items()}
        tables["all"].append({"benchmark": name, "n": found["base"]["n"], "scores": scores, "differences": compared(correct, name)})
        in_data = set(read_parquet(contamination / f"{name}.parquet")["doc_id"].to_pylist())
        rest = {model: {row: value for row, value in values.items() if row not in in_data} for model, values in correct.items()}
        tables["clean"].append({"benchmark": name, "n": len(rest["base"]), "scores": {}, "differences": {}})
        if len(rest["base"]) > 1:
            scores = {model: mean_of(list(values.values()), "score") for model, values in rest.items()}
            tables["clean"][-1] |= {"scores": scores, "differences": compared(rest, name)}
    for rows in tables.values():
        rows += averaged([row for row in rows if row["scores"]])
    mean = tables["all"][-1]
    headline = {model: value["score"] for model, value in mean["scores"].items()}
    headline |= {label: value["difference"] for label, value in mean["differences"].items()}
    write_json(summary, headline | tables | {"share_of_gain": share_of_gain(mean["differences"])})
    write_json(plot, bars(tables["all"]))


def compared(correct: dict[str, dict[int, float]], name: str) -> dict[str, dict[str, float]]:
    return {label: paired(correct[a], correct[b], name) for label, (a, b) in COMPARISONS.items()}


def read_correct(file: Path, n: int) -> dict[int, float]:
    table = read_parquet(file)
    found = dict(zip(table["doc_id"].to_pylist(), table["correct"].to_pylist(), strict=True))
    if not len(found) == table.num_rows == n:
        raise InputError(f"{file}: {table.num_rows} rows of {len(found)} documents, expected one for each of the {n} scored; `dvc repro` scores them anew")
    return found


def paired(first: dict[int, float], second: dict[int, float], name: str) -> dict[str, float]:
    """Mean of first minus second over the same rows, with its standard error."""
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise InputError(f"{name}: the models were scored on different rows (doc_id {odd[0]} and {len(odd) - 1} more); `dvc repro` scores them alike")
    return mean_of([first[key] - second[key] for key in sorted(first)], "difference")


def mean_of(values: list[float], key: str) -> dict[str, float]:
    """The mean of at least two values under `key`, with its standard error."""
    return {key: float(np.mean(values)), "stderr": float(np.std(values, ddof=1) / math.sqrt(len(values)))}


def averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over benchmarks, each with the same weight; their errors are independent. None of none."""

    def mean(values: list[dict[str, float]], key: str) -> dict[str, float]:
        return {key: sum(value[key] for value in values) / len(values), "stderr": math.hypot(*(value["stderr"] for value in values)) / len(values)}

    if not rows:
        return []
    scores = {model: mean([row["scores"][model] for row in rows], "score") for model in MODELS}
    differences = {label: mean([row["differences"][label] for row in rows], "difference") for label in COMPARISONS}
    return [{"benchmark": "mean", "n": sum(row["n"] for row in rows), "scores": scores, "differences": differences}]


def share_of_gain(mean: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """What part of the gain in mean score SFT and DPO each brought; nothing where there is no gain to share."""
    total = mean["dpo_vs_base"]["difference"]
    if total <= 0:
        return []
    return [{"stage": stage, "share": mean[label]["difference"] / total} for stage, label in (("sft", "sft_vs_base"), ("dpo", "dpo_vs_sft"))]


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"benchmark": row["benchmark"], "model": model, "label": f"{row['benchmark']} {model}", **value}
        for row in rows
        for model, value in row["scores"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("metrics", "evals", "contamination", "summary", "plot"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    benchmarks = params.load().evaluate.benchmarks
    run(benchmarks, arguments.metrics, arguments.evals, arguments.contamination, arguments.summary, arguments.plot)


if __name__ == "__main__":
    command(main)
