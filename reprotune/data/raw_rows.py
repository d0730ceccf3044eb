"""Rows of a raw table, and the errors that leave one out of training."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

Row = Mapping[str, Any]

INVALID = "_invalid"
"""Column of a raw table: why a row could not be stored, null for every other row."""


class InvalidRow(ValueError):
    """A row that cannot be trained on. It is left out and counted; the message is its reason."""


class NoPreference(InvalidRow):
    """A pair in which neither completion is better."""


def rows_of(batch: pa.RecordBatch) -> list[Row]:
    """The rows of a raw table, with one that Python cannot hold marked as INVALID.

    Arrow does not check that a text is UTF-8, nor that a date is within Python's calendar.
    """
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [{INVALID: f"a value cannot be read: {error}"}]
        return [row for index in range(batch.num_rows) for row in rows_of(batch.slice(index, 1))]


def readable(row: Row) -> Row:
    """The row itself; raises InvalidRow where it is marked as INVALID."""
    if row.get(INVALID) is not None:
        raise InvalidRow(row[INVALID])
    return row
