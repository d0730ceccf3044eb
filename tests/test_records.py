"""Records: the same content gives the same bytes, and no file is ever half-written."""

import pytest

from reprotune.errors import InputError
from reprotune.records import (
    filling,
    read_json,
    read_parquet,
    replacing,
    write_csv,
    write_json,
    write_parquet,
)


def test_json_is_sorted_rounded_and_ends_in_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"b": 0.1 + 0.2, "a": [1, {"z": 1 / 3}]})
    text = (tmp_path / "a.json").read_text()
    assert text == '{\n  "a": [\n    1,\n    {\n      "z": 0.3333333333\n    }\n  ],\n  "b": 0.3\n}\n'


def test_a_nan_is_refused_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "a.json", {"loss": 1.0})
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == {"loss": 1.0}


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {})
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_csv_rows_must_fit_their_header(tmp_path):
    write_csv(tmp_path / "a.csv", [{"step": 1, "loss": 2 / 3}], ["step", "loss"])
    assert (tmp_path / "a.csv").read_text() == "step,loss\n1,0.6666666667\n"
    with pytest.raises(AssertionError, match="row has"):
        write_csv(tmp_path / "a.csv", [{"step": 1}], ["step", "loss"])


def test_parquet_bytes_repeat(tmp_path):
    rows = [{"a": [1, 2], "b": "x"}, {"a": [], "b": "y"}]
    for name in ("one", "two"):
        write_parquet(tmp_path / name, rows)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_parquet(tmp_path / "one").to_pylist() == rows


def test_a_key_that_the_first_row_lacks_is_kept(tmp_path):
    write_parquet(tmp_path / "a", [{"x": 1}, {"x": 2, "y": "late"}])
    assert read_parquet(tmp_path / "a").to_pylist() == [{"x": 1, "y": None}, {"x": 2, "y": "late"}]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    with filling(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
    with pytest.raises(KeyboardInterrupt), filling(tmp_path / "out") as folder:
        (folder / "a").write_text("second")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a").write_text("{")
    with pytest.raises(InputError, match=r"a: not a JSON file"):
        read_json(tmp_path / "a")
    with pytest.raises(InputError, match=r"a: not a whole Parquet file.*dvc checkout"):
        read_parquet(tmp_path / "a")
