"""Which training rows hold a benchmark's rows, and which benchmark rows are held: n-grams of words that both have.

A benchmark row is contaminated by a training row that shares 13 words in a row with it (GPT-3, https://arxiv.org/abs/2005.14165,
appendix C), or whose shared 8-grams cover a given part of its words (Tülu 3, https://arxiv.org/abs/2411.15124, section 3.2). Words
are letters and digits, their case ignored; an n-gram lies within one text. Nothing is left out of training here: that is for
`data.*.exclude_contaminated`, and comparisons count clean rows apart.

8-grams of all benchmarks are hashed once; each training row's are then looked up in one step, and only rows with a hit are
compared word by word. All raw rows of the sources are searched, whether they are drawn for training or not.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from stages import InputError, command, params
from stages.formats import InvalidRow, Row, conversation_texts, pair_texts, rows_of, to_conversation, to_pair
from stages.records import filling, parquet_file, read_parquet, write_json, write_parquet

SHORT, LONG = 8, 13
"""Words of an n-gram that counts towards coverage, and of one that is enough by itself."""
BATCH = 2_000
"""Training rows in memory at once."""
BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd multiplier of the rolling hash, modulo 2^64; a hash that collides costs a comparison, not a wrong match."""

MATCH = pa.schema(
    {"doc_id": pa.int64(), "data": pa.string(), "source": pa.string(), "row": pa.int64(), "coverage": pa.float64(), "longest": pa.int64()}
)
"""doc_id: row of the scored split. coverage: part of its words within shared 8-grams. longest: words of the longest shared run."""


TextsOf = Callable[[Row], list[str]]


@dataclass(frozen=True)
class Document:
    """One text of a benchmark row; a WinoGrande row has two, the blank filled with either option."""

    benchmark: str
    doc_id: int
    words: np.ndarray
    """Numbers of its words in the vocabulary."""


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    section = settings.contamination
    vocabulary: dict[str, int] = {}
    documents: list[Document] = []
    counts: dict[str, dict[str, Any]] = {}
    for name in settings.evaluate.benchmarks:
        found = read_benchmark(paths.raw / "benchmarks" / name, name, section.columns[name], vocabulary)
        long_enough = [document for document in found if len(document.words) >= SHORT]
        rows, searched = ({document.doc_id for document in some} for some in (found, long_enough))
        counts[name] = {"benchmark": name, "rows": len(rows), "rows_too_short": len(rows - searched)}
        documents += long_enough
    index = Index(documents)
    matches: list[dict[str, Any]] = []
    trained: list[dict[str, Any]] = []
    for data, source, texts_of in readers(settings):
        found, count = search(paths.raw / data / f"{source}.parquet", texts_of, index, vocabulary, section.coverage)
        matches += [match | {"data": data, "source": source} for match in found]
        trained.append({"source": f"{data}.{source}", "rows": count, "rows_contaminated": len({match["row"] for match in found})})
    with filling(paths.out) as out:
        for name in settings.evaluate.benchmarks:
            own = [{key: match[key] for key in MATCH.names} for match in matches if match["benchmark"] == name]
            own.sort(key=lambda match: (match["doc_id"], match["data"], match["source"], match["row"]))
            write_parquet(out / f"{name}.parquet", own, MATCH)
            hit = {match["doc_id"] for match in own}
            counts[name]["rows_contaminated"] = len(hit)
            counts[name]["rows_with_13_gram"] = len({match["doc_id"] for match in own if match["longest"] >= LONG})
            print(f"{name}: {len(hit):,} of {counts[name]['rows']:,} rows are in the raw training data")
    tables = {"benchmarks": list(counts.values()), "training": trained}
    write_json(paths.metrics, tables | {"contaminated": sum(found["rows_contaminated"] for found in counts.values())})


def readers(settings: params.Params) -> Iterator[tuple[str, str, TextsOf]]:
    """(data, source, what gives a row's texts) of all training data; a row that is not trained on raises InvalidRow."""
    for name, source in sorted(settings.data.sft.sources.items()):
        yield "sft", name, lambda row, form=source.format: conversation_texts(to_conversation(row, form))
    for name, source in sorted(settings.data.preferences.sources.items()):
        yield "preferences", name, lambda row, form=source.format: pair_texts(to_pair(row, form))


def read_benchmark(folder: Path, name: str, column: str, vocabulary: dict[str, int]) -> list[Document]:
    """The documents of a benchmark's scored split; new words get the next numbers of the vocabulary, from 1."""
    files = sorted(folder.glob("*.parquet"))
    if len(files) != 1:
        raise InputError(f"{folder}: {len(files)} Parquet files, expected one, of the split that is scored; `dvc checkout {folder}` restores it")
    file = files[0]
    rows = read_parquet(file).to_pylist()
    if odd := next((row for row in rows if not isinstance(row.get(column), str)), None):
        raise InputError(f"params.yaml: contamination.columns.{name}: found {column!r}, expected a text column of {file}: {sorted(odd)}")
    documents = []
    for doc_id, row in enumerate(rows):
        for text in texts(row, column):
            numbers = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)]
            documents.append(Document(name, doc_id, np.array(numbers, np.int64)))
    return documents


def texts(row: Mapping[str, Any], column: str) -> list[str]:
    """The row's text; where it has a blank to fill, with each option filled in, as training data would have it."""
    if "_" in row[column] and {"option1", "option2"} <= row.keys():
        return [row[column].replace("_", row[option]) for option in ("option1", "option2")]
    return [row[column]]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def hashes(numbers: np.ndarray) -> np.ndarray:
    """A hash for each run of SHORT numbers, uint64 of shape (max(0, len - SHORT + 1),)."""
    count = max(0, len(numbers) - SHORT + 1)
    found = np.zeros(count, np.uint64)
    numbers = numbers.astype(np.uint64)
    for offset in range(SHORT):
        found = found * BASE + numbers[offset : offset + count]
    return found


class Index:
    """The 8-grams of all documents, by hash."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        grams = [hashes(document.words) for document in documents]
        flat = np.concatenate([np.zeros(0, np.uint64), *grams])
        owner = np.repeat(np.arange(len(documents)), [len(found) for found in grams])
        order = np.argsort(flat, kind="stable")
        self.sorted, self.owner = flat[order], owner[order]

    def hits(self, grams: np.ndarray) -> np.ndarray:
        """Places in `grams` whose hash is in the index."""
        if not len(self.sorted):
            return np.zeros(0, np.int64)
        places = np.searchsorted(self.sorted, grams)
        return np.flatnonzero(self.sorted[np.minimum(places, len(self.sorted) - 1)] == grams)

    def owners(self, gram: np.uint64) -> np.ndarray:
        """Documents that have a gram of this hash."""
        return self.owner[np.searchsorted(self.sorted, gram, "left") : np.searchsorted(self.sorted, gram, "right")]


def search(file: Path, texts_of: TextsOf, index: Index, vocabulary: Mapping[str, int], coverage: float) -> tuple[list[dict[str, Any]], int]:
    """Matches of all rows of a raw table, and how many rows it has."""
    found = []
    with parquet_file(file) as table, tqdm(total=table.metadata.num_rows, desc=file.stem, unit="row") as progress:
        number = 0
        for batch in table.iter_batches(BATCH, use_threads=False):
            numbers, row_of = batch_words(batch, number, texts_of, vocabulary)
            grams = hashes(numbers)
            # a 0, a word that no benchmark has, also stands between texts: its n-grams are in no benchmark
            for row, document, places in candidates(index, grams, row_of):
                match = compare(index.documents[document], numbers, places, coverage)
                if match:
                    found.append(match | {"row": row})
            number += batch.num_rows
            progress.update(batch.num_rows)
        return best(found), number


def batch_words(batch: pa.RecordBatch, first: int, texts_of: TextsOf, vocabulary: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """All words of a batch as numbers, 0 for words of no benchmark and between texts, and the row that each is in."""
    numbers: list[int] = []
    ends = []
    for row in rows_of(batch):
        try:
            found = texts_of(row)
        except InvalidRow:
            found = []
        for text in found:
            numbers.extend([vocabulary.get(word, 0) for word in words(text)])
            numbers.append(0)
        ends.append(len(numbers))
    return np.array(numbers, np.int64), first + np.repeat(np.arange(len(ends)), np.diff([0, *ends]))


def candidates(index: Index, grams: np.ndarray, row_of: np.ndarray) -> Iterator[tuple[int, int, list[int]]]:
    """(row, document, places of shared grams) for every pair of them with any."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place in map(int, index.hits(grams)):
        for document in set(map(int, index.owners(grams[place]))):
            found[int(row_of[place]), document].append(place)
    for (row, document), places in found.items():
        yield row, document, places


def compare(document: Document, numbers: np.ndarray, places: list[int], coverage: float) -> dict[str, Any] | None:
    """The match of a document with a training row that has its grams at `places`, None if it is no contamination."""
    own: dict[bytes, list[int]] = defaultdict(list)
    for start in range(len(document.words) - SHORT + 1):
        own[document.words[start : start + SHORT].tobytes()].append(start)
    covered = np.zeros(len(document.words), bool)
    runs: dict[int, tuple[int, int]] = {}
    longest = 0
    for place in places:
        for start in own.get(numbers[place : place + SHORT].tobytes(), ()):
            covered[start : start + SHORT] = True
            # both texts go on word by word where their places differ by the same
            last, length = runs.get(place - start, (-2, 0))
            runs[place - start] = place, (length + 1 if last == place - 1 else SHORT)
            longest = max(longest, runs[place - start][1])
    share = float(covered.mean())
    if longest < LONG and share < coverage:
        return None
    return {"benchmark": document.benchmark, "doc_id": document.doc_id, "coverage": share, "longest": longest}


def best(matches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One match for each benchmark row and training row, where a benchmark row has several documents."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for match in matches:
        key = (match["benchmark"], match["doc_id"], match["row"])
        if key not in found or match["coverage"] > found[key]["coverage"]:
            found[key] = match
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("raw", "out", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    run(params.load(), parser.parse_args())


if __name__ == "__main__":
    command(main)
