"""The spool: columns come back as they were written, and nothing but whole numbers is written."""

import numpy as np
import pyarrow as pa
import pytest

from reprotune.data.spool import TOKEN, Spool, encoded

COLUMNS = ("input_ids", "labels")
ROWS = [([5, 6, 7], [-100, 6, 7]), ([], []), ([2**31 - 1], [-(2**31)])]


def test_rows_come_back_in_any_order(tmp_path):
    lengths = np.array([[len(column) for column in row] for row in ROWS])
    with (tmp_path / "tokens").open("w+b") as file:
        file.write(encoded(column for row in ROWS for column in row))
        file.flush()
        table = Spool.of(file, COLUMNS, lengths).table(np.array([2, 0, 1, 0]))
    assert table.to_pylist() == [dict(zip(COLUMNS, ROWS[index], strict=True)) for index in (2, 0, 1, 0)]
    assert {column.type for column in table.columns} == {pa.list_(pa.from_numpy_dtype(TOKEN))}


@pytest.mark.parametrize("value", [0.5, float("nan"), 2**31, -(2**31) - 1])
def test_what_the_type_cannot_hold_is_refused(value):
    """A cast would cut a fractional weight to 0 without a word."""
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(AssertionError, match=f"found {value}, expected whole numbers of int32"),
    ):
        encoded([[1, 2], [3, value]])
