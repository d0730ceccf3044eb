"""The scores of cells, read and checked: models are compared under one protocol and on the same rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reprotune.errors import InputError
from reprotune.records import read_metrics, read_parquet

MODELS = ("base", "sft", "dpo")
COMPARISONS = {"sft_vs_base": ("sft", "base"), "dpo_vs_sft": ("dpo", "sft"), "dpo_vs_base": ("dpo", "base")}
"""The models of each comparison: the second is subtracted from the first."""
MEAN = "mean"
"""Name of the entry for the mean over benchmarks, next to those of the benchmarks."""

RowScores = dict[int, float]
"""The score of each row, by its `doc_id`."""
ModelScores = dict[str, RowScores]
"""The row scores of one benchmark, by model."""


def cell_files(benchmark: str, model: str, metrics: Path, evals: Path) -> tuple[Path, Path]:
    """The files of a cell's metrics and of its samples, the scored rows."""
    return metrics / model / f"{benchmark}.json", samples_file(benchmark, model, evals)


def samples_file(benchmark: str, model: str, evals: Path) -> Path:
    return evals / model / f"{benchmark}.parquet"


def read_cell(metrics: Path, samples: Path) -> tuple[dict[str, Any], RowScores]:
    """A cell's metrics and row scores, from its files.

    Raises:
        InputError: the samples are not one for each scored row.
    """
    record = read_metrics(metrics)
    rows, n = read_parquet(samples), record["n"]
    scores = dict(zip(rows["doc_id"].to_pylist(), rows["correct"].to_pylist(), strict=True))
    if not len(scores) == rows.num_rows == n:
        raise InputError(
            f"{samples}: found {rows.num_rows} rows of {len(scores)} documents, "
            f"expected one for each of the {n} scored; `dvc repro` scores them again"
        )
    return record, scores


def check_protocols(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to compare cells that were scored under different protocols.

    Args:
        records: metrics of cells of one benchmark, by file.
    """
    for file, record in records.items():
        if "protocol_parts" not in record:
            raise InputError(
                f"{file}: found no protocol_parts, which say how it was scored; `dvc repro` scores it again"
            )
    (first_file, first), *others = records.items()
    for file, record in others:
        only_first, only_here = missing(first, record), missing(record, first)
        if only_first or only_here:
            raise InputError(
                f"{first_file} and {file} are scores of different protocols "
                f"({', '.join(only_first) or 'nothing'} and {', '.join(only_here) or 'nothing'}); "
                "score both with the same params.yaml, code and data. If a library was upgraded without "
                "requirements.lock, which DVC does not see, `dvc repro --force --single-item evaluate` does"
            )


def missing(record: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parts of a cell's protocol that another's does not have."""
    return [str(part) for part in record["protocol_parts"] if part not in other["protocol_parts"]]


def paired(first: RowScores, second: RowScores, benchmark: str) -> np.ndarray:
    """The first model's score minus the second's on each row, (rows,).

    Raises:
        InputError: they were scored on different rows.
    """
    if first.keys() != second.keys():
        unpaired = sorted(first.keys() ^ second.keys())
        raise InputError(
            f"{benchmark}: the models were scored on different rows "
            f"(doc_id {unpaired[0]} and {len(unpaired) - 1} more); `dvc repro` scores them alike"
        )
    return np.array([first[row] - second[row] for row in sorted(first)])
