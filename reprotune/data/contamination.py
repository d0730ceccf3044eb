"""Which raw training rows contain a row of a benchmark's scored split, by the word n-grams that both share.

A benchmark row is contaminated when it shares LONG words in a row with one training row, or when the
SHORT-grams that it shares with one cover a given part of its words.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from reprotune import params
from reprotune.data.conversations import conversation_texts, pair_texts
from reprotune.data.formats import to_conversation, to_pair
from reprotune.data.ngrams import SHORT, Index, candidates, overlap, words
from reprotune.data.raw_rows import InvalidRow, Row, rows_of
from reprotune.errors import InputError
from reprotune.records import filling, parquet_file, read_parquet, write_metrics, write_parquet

LONG = 13
"""Words of a shared run that is enough by itself (GPT-3, https://arxiv.org/abs/2005.14165, appendix C)."""
BATCH = 2_000
"""Training rows in memory at once."""
UNKNOWN = 0
"""Number of a word that no benchmark has, and of the gap behind a text: no indexed n-gram contains it."""

MATCH = pa.schema(
    {
        "doc_id": pa.int64(),
        "data": pa.string(),
        "source": pa.string(),
        "row": pa.int64(),
        "coverage": pa.float64(),
        "longest": pa.int64(),
    }
)
"""doc_id: row of the scored split. coverage and longest: see `ngrams.Overlap`."""

Match = dict[str, Any]
"""The columns of MATCH, and the benchmark."""
TextsOf = Callable[[Row], list[str]]
"""The texts of a raw row; raises InvalidRow for one that is not trained on."""


@dataclass(frozen=True)
class Document:
    """One text of a benchmark row. A WinoGrande row has two, the blank filled with either option."""

    benchmark: str
    doc_id: int
    words: np.ndarray
    """Numbers of its words in the vocabulary, int64."""


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    """Search all raw rows of all sources, drawn for training or not, and write each benchmark's matches."""
    section = settings.contamination
    vocabulary: dict[str, int] = {}
    documents = {
        name: read_benchmark(paths.raw / "benchmarks" / name, name, section.columns[name], vocabulary)
        for name in settings.evaluate.benchmarks
    }
    searcher = Searcher(
        [document for name in documents for document in long_enough(documents[name])],
        vocabulary,
        section.coverage,
    )
    matches: list[Match] = []
    trained: list[dict[str, Any]] = []
    for data, source, texts_of in training_sources(settings):
        in_source, count = searcher.search(paths.raw / data / f"{source}.parquet", texts_of)
        matches += [match | {"data": data, "source": source} for match in in_source]
        contaminated = len({match["row"] for match in in_source})
        trained.append({"source": f"{data}.{source}", "rows": count, "rows_contaminated": contaminated})
    counts = []
    with filling(paths.out) as out:
        for name in settings.evaluate.benchmarks:
            own_matches = [match for match in matches if match["benchmark"] == name]
            write_matches(out / f"{name}.parquet", own_matches)
            counts.append(benchmark_counts(name, documents[name], own_matches))
    write_metrics(
        paths.metrics,
        {"contaminated": sum(count["rows_contaminated"] for count in counts)},
        {"benchmarks": counts, "training": trained},
    )


def write_matches(file: Path, matches: Sequence[Match]) -> None:
    rows = [{key: match[key] for key in MATCH.names} for match in matches]
    rows.sort(key=lambda match: (match["doc_id"], match["data"], match["source"], match["row"]))
    write_parquet(file, rows, MATCH)


def benchmark_counts(name: str, documents: Sequence[Document], matches: Sequence[Match]) -> dict[str, Any]:
    rows = doc_ids(documents)
    contaminated = {match["doc_id"] for match in matches}
    print(f"{name}: {len(contaminated):,} of {len(rows):,} rows are in the raw training data")
    return {
        "benchmark": name,
        "rows": len(rows),
        "rows_too_short": len(rows - doc_ids(long_enough(documents))),
        "rows_contaminated": len(contaminated),
        "rows_with_13_gram": len({match["doc_id"] for match in matches if match["longest"] >= LONG}),
    }


def long_enough(documents: Sequence[Document]) -> list[Document]:
    return [document for document in documents if len(document.words) >= SHORT]


def doc_ids(documents: Sequence[Document]) -> set[int]:
    return {document.doc_id for document in documents}


def training_sources(settings: params.Params) -> Iterator[tuple[str, str, TextsOf]]:
    """(data, source, texts of a row) for all training data."""
    for name, source in sorted(settings.data.sft.sources.items()):
        yield "sft", name, partial(texts_of_example, source)
    for name, pair_source in sorted(settings.data.preferences.sources.items()):
        yield "preferences", name, partial(texts_of_pair, pair_source)


def texts_of_example(source: params.SftSource, row: Row) -> list[str]:
    return conversation_texts(to_conversation(row, source.format, source.ignore))


def texts_of_pair(source: params.PreferenceSource, row: Row) -> list[str]:
    return pair_texts(to_pair(row, source.format, source.ignore))


def read_benchmark(folder: Path, name: str, column: str, vocabulary: dict[str, int]) -> list[Document]:
    """The documents of a benchmark's scored split; adds new words to the vocabulary, numbered from 1."""
    files = sorted(folder.glob("*.parquet"))
    if len(files) != 1:
        raise InputError(
            f"{folder}: {len(files)} Parquet files, expected one, of the split that is scored; "
            f"`dvc checkout {folder}` restores it"
        )
    (file,) = files
    rows = read_parquet(file).to_pylist()
    if without_text := next((row for row in rows if not isinstance(row.get(column), str)), None):
        raise InputError(
            f"params.yaml: contamination.columns.{name}: found {column!r}, "
            f"expected a text column of {file}: {sorted(without_text)}"
        )
    documents = []
    for doc_id, row in enumerate(rows):
        for text in benchmark_texts(row, column):
            numbers = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)]
            documents.append(Document(name, doc_id, np.array(numbers, np.int64)))
    return documents


def benchmark_texts(row: Mapping[str, Any], column: str) -> list[str]:
    """The row's text. A blank is filled with each option, as training data would have it."""
    if "_" in row[column] and {"option1", "option2"} <= row.keys():
        return [row[column].replace("_", row[option]) for option in ("option1", "option2")]
    return [row[column]]


class Searcher:
    """Search of training rows for the documents of all benchmarks."""

    def __init__(self, documents: Sequence[Document], vocabulary: Mapping[str, int], coverage: float) -> None:
        self.documents, self.vocabulary, self.coverage = documents, vocabulary, coverage
        self.index = Index([document.words for document in documents])

    def search(self, file: Path, texts_of: TextsOf) -> tuple[list[Match], int]:
        """The matches of all rows of a raw table, and how many rows it has."""
        matches: list[Match] = []
        with (
            parquet_file(file) as table,
            tqdm(total=table.metadata.num_rows, desc=file.stem, unit="row") as progress,
        ):
            first = 0
            for batch in table.iter_batches(BATCH, use_threads=False):
                numbers, row_of = self.batch_words(batch, first, texts_of)
                matches += self.batch_matches(numbers, row_of)
                first += batch.num_rows
                progress.update(batch.num_rows)
            return best(matches), first

    def batch_words(
        self, batch: pa.RecordBatch, first: int, texts_of: TextsOf
    ) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of all words, UNKNOWN behind each text, and the row of each, counted from `first`."""
        numbers: list[int] = []
        ends = []
        for row in rows_of(batch):
            try:
                texts = texts_of(row)
            except InvalidRow:
                texts = []
            for text in texts:
                numbers.extend([self.vocabulary.get(word, UNKNOWN) for word in words(text)])
                numbers.append(UNKNOWN)
            ends.append(len(numbers))
        row_of = first + np.repeat(np.arange(len(ends)), np.diff([0, *ends]))
        return np.array(numbers, np.int64), row_of

    def batch_matches(self, numbers: np.ndarray, row_of: np.ndarray) -> Iterator[Match]:
        for row, place_of_document, places in candidates(self.index, numbers, row_of):
            document = self.documents[place_of_document]
            coverage, longest = overlap(document.words, numbers, places)
            if longest >= LONG or coverage >= self.coverage:
                yield {
                    "benchmark": document.benchmark,
                    "doc_id": document.doc_id,
                    "coverage": coverage,
                    "longest": longest,
                    "row": row,
                }


def best(matches: Sequence[Match]) -> list[Match]:
    """For each benchmark row and training row the match of largest coverage, where two documents match."""
    kept: dict[tuple[str, int, int], Match] = {}
    for match in matches:
        key = (match["benchmark"], match["doc_id"], match["row"])
        if key not in kept or match["coverage"] > kept[key]["coverage"]:
            kept[key] = match
    return list(kept.values())
