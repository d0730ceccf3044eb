"""Cells written by hand, as `evaluate` leaves them, and their comparison."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reprotune import params, params_file
from reprotune.comparison import compare
from reprotune.comparison.scores import cell_files
from reprotune.data.contamination import MATCH
from reprotune.records import read_json, write_metrics, write_parquet
from tests.tiny import ROOT

SAMPLE = {
    "prompt": "The cat",
    "gold": "0",
    "choices": [" sleeps", " barks"],
    "log_probs": [-1.0, -2.5],
    "generation": None,
}
PROTOCOL = {"task": "a 1"}


def write_scores(
    folder: Path,
    benchmark: str,
    correct: Mapping[str, Sequence[float]],
    contaminated: Sequence[int] = (),
    protocols: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write metrics/, evals/ and contamination/ of one benchmark. Rows are numbered 0, 3, 6, and so on.

    Args:
        correct: the score of each row, by model.
        contaminated: numbers of rows.
        protocols: by model; PROTOCOL where it is not given.
    """
    match = {"data": "sft", "source": "rows", "row": 0, "coverage": 1.0, "longest": 20}
    matches = [match | {"doc_id": doc_id} for doc_id in contaminated]
    write_parquet(folder / "contamination" / f"{benchmark}.parquet", matches, MATCH)
    for model, values in correct.items():
        metrics, samples = cell_files(benchmark, model, folder / "metrics", folder / "evals")
        mean = sum(values) / len(values)
        protocol = (protocols or {}).get(model, PROTOCOL)
        write_metrics(
            metrics,
            {"score": mean, "n": len(values)},
            {
                "stderr": math.sqrt(mean * (1 - mean) / (len(values) - 1)),
                "protocol_parts": [f"{part}: {value}" for part, value in protocol.items()],
            },
        )
        rows = [
            SAMPLE | {"doc_id": 3 * index, "correct": value, "predicted": str(int(1 - value))}
            for index, value in enumerate(values)
        ]
        write_parquet(samples, rows)


def with_benchmarks(*names: str) -> params.Params:
    """The committed params with these benchmarks to compare."""
    settings = params_file.load(ROOT / "params.yaml")
    return settings.model_copy(
        update={"evaluate": settings.evaluate.model_copy(update={"benchmarks": list(names)})}
    )


def summarize(settings: params.Params, folder: Path) -> dict[str, Any]:
    """Run `compare` on what `write_scores` wrote; it writes beside that, and returns compare.json."""
    metrics = folder / "metrics"
    compare.run(
        settings,
        metrics,
        folder / "evals",
        folder / "contamination",
        metrics / "summary.json",
        folder / "summary.md",
        metrics / "mean",
        folder / "scores.json",
    )
    return read_json(metrics / "summary.json")
