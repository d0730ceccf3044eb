"""The file that holds all tokenized rows between tokenizing and the writing of shards.

Rows follow one another, and each row's columns one another, as bare numbers of the type TOKEN.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa

TOKEN = np.dtype(np.int32)
"""The type of a token, and of a label, in the spool and in shards."""


def encoded(columns: Iterable[Sequence[int]]) -> bytes:
    """Columns of tokens as the spool holds them. Only whole numbers in the range of TOKEN can be held."""
    return b"".join(whole_numbers(values).tobytes() for values in columns)


def whole_numbers(values: Sequence[int]) -> np.ndarray:
    given = np.asarray(values)
    tokens = given.astype(TOKEN)
    # a cast alone would cut off the fraction of a weight without a word
    assert (tokens == given).all(), f"found {given[tokens != given][0]}, expected whole numbers of {TOKEN}"
    return tokens


@dataclass(frozen=True)
class Spool:
    file: BinaryIO
    columns: tuple[str, ...]
    lengths: np.ndarray
    """Tokens of each column of each row, shape (rows, columns)."""
    offsets: np.ndarray
    """Tokens before each row, int64 of shape (rows + 1,)."""

    @classmethod
    def of(cls, file: BinaryIO, columns: tuple[str, ...], lengths: np.ndarray) -> "Spool":
        offsets = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
        return cls(file, columns, lengths, offsets)

    def table(self, order: np.ndarray) -> pa.Table:
        """The rows of these indices, a list column for each of `columns`."""
        sizes = self.lengths[order]
        # offsets of Arrow's lists, which are int32 whatever the lists hold
        ends = np.concatenate([np.zeros((1, len(self.columns)), np.int64), np.cumsum(sizes, axis=0)])
        starts = [column.astype(np.int32) for column in ends.T]
        values = [np.empty(column[-1], TOKEN) for column in starts]
        # in the order of the file, which reads faster
        for place in np.argsort(self.offsets[order], kind="stable"):
            row = self.read(int(self.offsets[order[place]]), int(sizes[place].sum()))
            done = 0
            for part, size in enumerate(sizes[place]):
                values[part][starts[part][place] : starts[part][place + 1]] = row[done : done + size]
                done += size
        return pa.Table.from_arrays(
            [pa.ListArray.from_arrays(*column) for column in zip(starts, values, strict=True)],
            names=list(self.columns),
        )

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens behind the first `start`."""
        content = os.pread(self.file.fileno(), count * TOKEN.itemsize, start * TOKEN.itemsize)
        return np.frombuffer(content, TOKEN)
