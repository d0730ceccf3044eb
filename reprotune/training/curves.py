"""Curves of a training stage: one row a step, and the held-out measurements. Both repeat exactly."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from reprotune.records import write_csv


def curve(log_history: Iterable[Mapping[str, float]], names: Mapping[str, str]) -> list[dict[str, float]]:
    """A row for each step of a trainer's log.

    Args:
        names: the trainer's key for each column. Its `num_tokens` counts from the first step.
    """
    return [
        {"step": entry["step"], **{column: entry[key] for column, key in names.items()}}
        for entry in log_history
        if "loss" in entry
    ]


def write_curves(
    plots: Path, stage: str, rows: list[dict[str, float]], held_out: list[dict[str, float]]
) -> None:
    """Write both curves as `<stage>.csv` and `<stage>_held_out.csv`."""
    for name, table in ((stage, rows), (f"{stage}_held_out", held_out)):
        write_csv(plots / f"{name}.csv", table, list(table[0]))
