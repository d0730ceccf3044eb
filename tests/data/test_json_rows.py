"""JSON files as people have them: encodings, names that say something else, and values that are not JSON."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reprotune.data import tables
from reprotune.errors import InputError
from reprotune.records import read_parquet

ROWS = [{"x": "a\u2028b é", "n": 1}, {"x": "c\r\nd", "n": 2}, {"x": "{}", "n": 3}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def stored(folder, name: str, content: bytes) -> list[dict]:
    (folder / name).write_bytes(content)
    tables.write_table(folder / name, folder / "out" / "rows.parquet", "mine")
    return read_parquet(folder / "out" / "rows.parquet").to_pylist()


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "ROWS.JSON"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS, ensure_ascii=False),
        json.dumps(ROWS, indent=2),
        "\n".join(LINES),
        "\r\n".join(LINES) + "\r\n",
        "\r".join(LINES) + "\r",
        "".join(LINES),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
    ],
    ids=["list", "indented list", "lines", "CR LF", "CR", "joined", "indented objects"],
)
def test_rows_are_read_in_any_encoding_and_form(name, encoding, text, tmp_path):
    assert stored(tmp_path, name, text.encode(encoding)) == ROWS


def test_files_that_were_joined_with_their_byte_order_marks(tmp_path):
    content = "\n".join(LINES).encode("utf-8-sig")
    assert stored(tmp_path, "rows.jsonl", content + b"\n" + content) == ROWS + ROWS


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_broken_line_is_a_row_of_its_own(name, tmp_path):
    rows = stored(tmp_path, name, "\n".join([LINES[0], LINES[1][:-3], LINES[2]]).encode())
    assert [row["n"] for row in rows] == [1, None, 3]
    assert rows[1]["_invalid"].startswith(f"{name}, row 1: line 2 is not JSON (")


PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"x": ["a"]}), PARQUET)
OTHER = {
    "gzip": ("a.json", gzip.compress(b"[]"), "a.json: not JSON: found gzip; unpack it with `gunzip`"),
    "zip": ("a.jsonl", b"PK\x03\x04...", "a.jsonl: not JSON: found a zip archive or a spreadsheet"),
    "zstd": ("a.json", b"\x28\xb5\x2f\xfd...", "found Zstandard; unpack it with `unzstd`"),
    "Parquet": ("a.json", PARQUET.getvalue().to_pybytes(), "found Parquet; give it a name that ends in .parquet"),  # noqa: E501
    "JSON": ("a.parquet", b'\n[{"x": 1}]', "a.parquet: not Parquet: found JSON; give it a name that ends in .json"),  # noqa: E501
    "LFS": ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "found a Git LFS pointer; `git lfs pull`"),  # noqa: E501
    "LFS of Parquet": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "not Parquet: found a Git LFS pointer"),  # noqa: E501
    "HTML": ("a.json", b"\xef\xbb\xbf\n<!DOCTYPE html>", "found a page of HTML or XML; download the file itself"),  # noqa: E501
    "CSV": ("a.json", b"instruction,output\nhi,you\n", "a.json: not JSON: found CSV; write its rows as JSON"),
    "quoted CSV": ("a.jsonl", b'"instruction","output"\r\n"hi, you","b"\r\n', "not JSON: found CSV"),
    "TSV": ("a.json", b"instruction\toutput\nhi, a\tyou\n", "not JSON: found TSV"),
    "empty": ("a.json", b"", "a.json: not JSON: found an empty file"),
    "blank": ("a.json", b" \n", "a.json: not JSON: found an empty file"),
    "half of UTF-16": ("a.json", "[{}]".encode("utf-16")[:-1], "not JSON: found text that is UTF-16 at its start alone"),  # noqa: E501
    "cut off": ("a.json", json.dumps(ROWS, indent=1).encode()[:-9], "a.json: not JSON: Unterminated string starting at: line 12"),  # noqa: E501
    "cut off, in one line": ("a.json", json.dumps([{"x": "a, b " * 9} for _ in range(5_000)]).encode()[:-9], "a.json: not JSON: Unterminated string"),  # noqa: E501
    "cut off, in lines": ("a.json", json.dumps([{"x": 1, "y": 2}] * 50).replace("}, ", "},\n").encode()[:-9], "a.json: not JSON: Expecting"),  # noqa: E501
    "cut off, two lines": ("a.jsonl", b'{"x": 1, "y": 2}\n{"x": 1, "y": ', "a.jsonl: not JSON: line 2 is not JSON"),  # noqa: E501
    "record separators": ("a.jsonl", b'\x1e{"x": 1, "y": 2}\n\x1e{"x": 1, "y": 2}\n', "a.jsonl: not JSON: Expecting value"),  # noqa: E501
    "Python": ("a.json", b"[{'x': 1}]", "a.json: not JSON: Expecting property name enclosed in double quotes"),  # noqa: E501
    "list under a key": ("a.json", b'{"v": 1, "data": [{"x": 1}, {"x": 2}]}', "found an object, expected a list of rows; it has 2 objects under `data`: `jq '.\"data\"'` writes"),  # noqa: E501
    "columns": ("a.json", b'{"x": {"0": "a"}, "y": {"0": "b"}}', "found an object, expected a list of rows; it has columns"),  # noqa: E501
    "columns as lists": ("a.json", b'{"x": ["a"], "y": ["b"]}', "it has columns: pandas' to_json(orient='records')"),  # noqa: E501
    "one row": ("a.json", b'{"x": "a"}', "found an object, expected a list of rows; put one row into a list"),
    "a text": ("a.json", b'"x"', "found a text, expected a list of rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_what_a_file_is_instead_is_said(case, tmp_path):
    name, content, expected = OTHER[case]
    with pytest.raises(InputError) as error:
        stored(tmp_path, name, content)
    assert expected in str(error.value)
    assert not (tmp_path / "out" / "rows.parquet").exists()


def reasons(folder, *values: str) -> list[str | None]:
    """Why each row is invalid, for rows with these values, in JSON, under `x`."""
    content = "[" + ", ".join(f'{{"x": {value}, "y": 1}}' for value in values) + "]"
    return [row.get("_invalid") for row in stored(folder, "a.json", content.encode())]


@pytest.mark.parametrize(
    ("value", "name"),
    [("NaN", "NaN"), ("Infinity", "Infinity"), ("-Infinity", "-Infinity"), ("1e999", "Infinity")],
)
def test_a_value_that_is_no_number_among_texts(value, name, tmp_path):
    """However many rows have it, the texts are right."""
    reason = f"`x` is {name}, expected a text as in other rows; JSON has no such number: null is for"
    found = reasons(tmp_path, value, value, '"a"', value)
    assert found[2] is None
    assert all(reason in str(found[index]) for index in (0, 1, 3))
    found = reasons(tmp_path, '{"k": ["a"]}', f'{{"k": [{value}]}}', f'{{"k": [{value}, {value}]}}')
    assert found[0] is None and "`x.k[]` is" in str(found[1]) and "`x.k[]` is" in str(found[2])
    assert f"`x[]` holds a text and {name}" in str(reasons(tmp_path, f'["a", {value}]', '["b"]')[0])


def test_among_numbers_it_is_one(tmp_path):
    """What reads the column decides on it, as on a column of Parquet."""
    assert reasons(tmp_path, "1", "NaN", "Infinity", "2.5") == [None] * 4
    assert reasons(tmp_path, "[1, NaN]", "[NaN]", "[2.5]") == [None] * 3


def test_numbers_among_texts_are_what_is_odd(tmp_path):
    numbers = [str(number) for number in range(6)]
    found = reasons(tmp_path, *numbers, '"a"', '"b"', "true", "null")
    expected = "a.json, row {}: `x` is {}, expected a text as in other rows"
    assert found[:6] == [expected.format(number, "a number") for number in range(6)]
    assert found[6:] == [None, None, expected.format(8, "true or false"), None]
    # a stray text in a column of numbers
    found = reasons(tmp_path, *map(str, range(20)), '"unknown"')
    assert found == [None] * 20 + ["a.json, row 20: `x` is a text, expected a number as in other rows"]
