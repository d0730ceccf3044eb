"""Fetch one benchmark's rows as Parquet with the Hub's columns, which lm-eval's task definitions read.

The scored split goes to `<b>/<split>.parquet`, few-shot examples of another split to
`<b>/fewshot/<split>.parquet`.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from reprotune import params
from reprotune.data.sources import CORRECT, fetched, files_in
from reprotune.errors import InputError, first_line
from reprotune.records import filling, read_parquet, write_parquet

Splits = dict[str, list[dict[str, Any]]]
"""The rows of each split."""


def run(name: str, benchmark: params.Benchmark, out: Path) -> None:
    with fetched(benchmark.source) as path:
        splits = READERS[benchmark.format](path, benchmark.split)
    for split in (benchmark.split, benchmark.fewshot_split):
        if not splits.get(split):
            raise InputError(
                f"benchmarks.{name}: no rows for split {split!r}, found {sorted(splits)}; "
                "correct source, split or fewshot_split"
            )
    with filling(out) as folder:
        write_parquet(folder / f"{benchmark.split}.parquet", splits[benchmark.split])
        if benchmark.fewshot_split != benchmark.split:
            write_parquet(
                folder / "fewshot" / f"{benchmark.fewshot_split}.parquet", splits[benchmark.fewshot_split]
            )
    for split in sorted({benchmark.split, benchmark.fewshot_split}):
        print(f"{name}: {len(splits[split]):,} rows in {split}")


def hub(path: Path, split: str) -> Splits:
    """Parquet files named as the Hub names them, the split first: test-00000-of-00001.parquet."""
    splits: Splits = {}
    for file in files_in(path):
        if file.suffix == ".parquet":
            splits.setdefault(file.stem.split("-")[0], []).extend(read_parquet(file, CORRECT).to_pylist())
    return splits


def arrow(path: Path, split: str) -> Splits:
    """An Arrow stream, as `datasets` saves it, or a folder with a folder of streams for each split."""
    if path.is_file():
        files = [(split, path)]
    else:
        files = [(file.parent.name, file) for file in files_in(path) if file.suffix == ".arrow"]
    splits: Splits = {}
    for name, file in files:
        try:
            with pa.ipc.open_stream(file.read_bytes()) as reader:
                splits.setdefault(name, []).extend(reader.read_all().to_pylist())
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"{file.name}: not a whole Arrow stream ({first_line(error)}); correct `path` or `format`"
            ) from error
    return splits


def arrow_boolq(path: Path, split: str) -> Splits:
    """{question, passage, answer} to SuperGLUE's {question, passage, label}."""
    return {
        name: [{**row, "label": int(row["answer"])} for row in rows]
        for name, rows in arrow(path, split).items()
    }


def olmes_documents(path: Path) -> list[dict[str, Any]]:
    """The document of each request in a file of OLMES."""
    try:
        return [json.loads(line)["doc"] for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path.name}: not a gzipped file of OLMES requests ({error}); correct `path` or `format`"
        ) from error


def olmes_arc(path: Path, split: str) -> Splits:
    """{id, question, choices{text, label}, answerKey}, from a request for each (document, choice).

    A request has its question inside the prompt, and no labels of choices: these become A, B, C, …
    """
    rows = {}
    for document in olmes_documents(path):
        labels = [chr(ord("A") + index) for index in range(len(document["choices"]))]
        rows[document["id"]] = {
            "id": document["id"],
            "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": document["choices"], "label": labels},
            "answerKey": labels[document["gold"]],
        }
    return {split: list(rows.values())}


def olmes(*columns: str) -> Callable[[Path, str], Splits]:
    """A reader of documents that have the Hub's columns, among others."""
    return lambda path, split: {
        split: [{column: document[column] for column in columns} for document in olmes_documents(path)]
    }


READERS: dict[str, Callable[[Path, str], Splits]] = {
    "hub": hub,
    "arrow": arrow,
    "arrow_boolq": arrow_boolq,
    "olmes_arc": olmes_arc,
    "olmes_gsm8k": olmes("question", "answer"),
    "olmes_humaneval": olmes("task_id", "prompt", "canonical_solution", "test", "entry_point"),
}
