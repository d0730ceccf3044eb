"""The metrics and curves that the report is made of."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reprotune import params
from reprotune.comparison.scores import MEAN
from reprotune.comparison.table import Rows
from reprotune.errors import InputError
from reprotune.records import read_json, read_metrics

StageMetrics = Mapping[str, Any]


@dataclass(frozen=True)
class Metrics:
    rows: Rows
    """The comparison on all rows, benchmarks in the order of params.yaml."""
    clean: Rows
    """The comparison on clean rows, without benchmarks that have too few."""
    shares: Mapping[str, Mapping[str, float]]
    """The shares of `sft` and `dpo` in the gain of the mean score; empty where no gain is shown."""
    data: Mapping[str, StageMetrics]
    """Of `tokenize_sft` and `tokenize_dpo`, under `sft` and `dpo`, and of `contamination`."""
    train: Mapping[str, StageMetrics]
    """Of `sft` and `dpo`."""
    merged: StageMetrics
    """Of `merge`."""


def read(settings: params.Params, folder: Path) -> Metrics:
    summary = read_json(folder / "summary.json")
    return Metrics(
        rows={name: summary["all"][name] for name in [*settings.evaluate.benchmarks, MEAN]},
        clean=summary["clean"],
        shares=summary.get("share_of_gain", {}),
        data={
            name: read_metrics(folder / "data" / f"{name}.json") for name in ("sft", "dpo", "contamination")
        },
        train={name: read_metrics(folder / "train" / f"{name}.json") for name in ("sft", "dpo")},
        merged=read_metrics(folder / "merge.json"),
    )


def read_curve(file: Path) -> list[dict[str, float]]:
    """The rows of a curve, by column.

    Raises:
        InputError: a value is not a number.
    """
    with file.open(encoding="utf-8", newline="") as opened:
        try:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(opened)]
        except (TypeError, ValueError, UnicodeDecodeError) as error:
            raise InputError(
                f"{file}: not a table of numbers ({error}); `dvc repro` makes it again"
            ) from error
