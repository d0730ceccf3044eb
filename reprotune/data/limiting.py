"""The rows that are taken from each source's raw table, as its `limit` says, read in batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from reprotune.data.selection import generator
from reprotune.params import PreferencesData, SftData
from reprotune.records import parquet_file

CHUNK = 500
"""Rows that a worker gets at once."""


@dataclass(frozen=True)
class Taken:
    """A source's raw table, and which of its rows are taken."""

    name: str
    format: str
    ignore: list[str]
    """Fields of its rows that are left out."""
    file: Path
    raw: int
    """Rows in the table."""
    numbers: np.ndarray
    """Row numbers that are taken, ascending, int32."""


def take(data: SftData | PreferencesData, seed: int, raw: Path) -> list[Taken]:
    taken = []
    for name in sorted(data.sources):
        source = data.sources[name]
        file = raw / f"{name}.parquet"
        with parquet_file(file) as table:
            count = table.metadata.num_rows
        limit = data.mix[name].limit
        numbers = np.arange(count, dtype=np.int32)
        if limit is not None and limit < count:
            numbers = np.sort(generator(seed, f"limit {name}").permutation(count)[:limit]).astype(np.int32)
        taken.append(Taken(name, source.format, source.ignore, file, count, numbers))
    return taken


def batches(source: Taken) -> Iterator[pa.RecordBatch]:
    """The taken rows, CHUNK at a time, with one row group in memory."""
    with parquet_file(source.file) as table:
        start = 0
        for group in range(table.num_row_groups):
            end = start + table.metadata.row_group(group).num_rows
            first, last = np.searchsorted(source.numbers, (start, end))
            inside = source.numbers[first:last] - start
            if len(inside):
                rows = table.read_row_group(group, use_threads=False).take(inside)
                for batch in rows.combine_chunks().to_batches(max_chunksize=CHUNK):
                    # a slice would be sent to the worker with the whole row group
                    yield batch.take(pa.array(range(batch.num_rows)))
            start = end
