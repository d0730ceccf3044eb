"""A benchmark's rows: which of them are scored, and by which of lm-eval's tasks."""

import random
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

import pyarrow.parquet as pq

from reprotune import params
from reprotune.errors import InputError
from reprotune.records import parquet_file, read_parquet


@dataclass
class Part:
    """The rows of a benchmark that one task of lm-eval scores."""

    task: str
    numbers: dict[int, int]
    """The number in the benchmark of each scored row, by its number among the task's rows."""


def subset(file: Path, name: str, limit: int | None, seed: int) -> list[int]:
    """Numbers of the scored rows, in order, drawn by seed and benchmark: adding a benchmark changes no other.

    Raises:
        InputError: there are too few rows for a standard error.
    """
    count = row_count(file)
    if count < 2:
        raise InputError(
            f"{file}: found {count} rows, expected at least 2, which a standard error needs; "
            f"correct benchmarks.{name}.source"
        )
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{seed} {name}").sample(range(count), limit))


def row_count(file: Path) -> int:
    with parquet_file(file) as table:
        return table.metadata.num_rows


def split_by_task(
    name: str, benchmark: params.Benchmark, files: list[Path], indices: list[int], folder: Path
) -> list[Part]:
    """Write each task's rows to `folder/<task>/<split>.parquet`; returns the tasks with scored rows.

    A name with a column in braces, `mmlu_{subject}`, stands for one task for each value of that column.

    Args:
        files: the scored split, then the few-shot examples where they come from another.
        indices: numbers of the scored rows.

    Raises:
        InputError: a file has no such column.
    """
    task = benchmark.task or name
    column = next((field for _, field, _, _ in Formatter().parse(task) if field), None)
    parts: dict[str, Part] = {}
    for file in files:
        table = read_parquet(file)
        if column is not None and column not in table.column_names:
            raise InputError(
                f"params.yaml: benchmarks.{name}.task: found {task!r}, expected a column of {file} in the "
                f"braces, one of {table.column_names}"
            )
        values = [None] * table.num_rows if column is None else table[column].to_pylist()
        scored = set(indices) if file == files[0] else set()
        for value in sorted(set(values), key=str):
            numbers = [number for number, row_value in enumerate(values) if row_value == value]
            task_name = task if column is None else task.format(**{column: value})
            part = parts.setdefault(task_name, Part(task_name, {}))
            part.numbers |= {place: number for place, number in enumerate(numbers) if number in scored}
            (folder / task_name).mkdir(exist_ok=True)
            pq.write_table(table.take(numbers), folder / task_name / file.name)
    return [part for part in parts.values() if part.numbers]


def check_shots(name: str, shots: int, file: Path, scored: bool) -> None:
    """Raise InputError if a task has too few few-shot examples.

    Args:
        file: of the examples.
        scored: whether they are the scored rows too: a row is never its own example.
    """
    count = row_count(file) - scored if file.exists() else 0
    if shots > count:
        raise InputError(
            f"params.yaml: benchmarks.{name}.num_fewshot: found {shots}, expected at most {count}, the "
            f"examples of {file.parent.name} in {file.name}"
        )


def check_documents(name: str, task: str, documents: int, rows: int) -> None:
    """Raise InputError if a task drops or adds documents: a sample finds its row by its document's number."""
    if documents != rows:
        raise InputError(
            f"params.yaml: benchmarks.{name}: {task} makes {documents} documents of its {rows} rows, "
            "expected one of each; take it out of evaluate.benchmarks"
        )
