"""Source files to tables: real packages, the source's columns and order, and files that make no table."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reprotune import params_file
from reprotune.data import tables
from reprotune.data.formats import to_pair
from reprotune.data.sources import local_sha256
from reprotune.errors import InputError
from reprotune.params import LocalSource
from reprotune.records import read_parquet
from tests.tiny import ROOT


def source(path) -> LocalSource:
    return LocalSource(kind="local", path=str(path), sha256=local_sha256(path))


def rows_of(path, folder) -> list[dict]:
    tables.write_table(path, folder / "out.parquet", "mine")
    return read_parquet(folder / "out.parquet").to_pylist()


def test_rows_become_parquet_with_their_own_columns(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"b": "x", "a": {"n": 1}}\n\n{"b": "y", "a": {"n": 2.5}, "c": {}}\n'
    )
    tables.run("mine", source(tmp_path / "rows.jsonl"), tmp_path / "out" / "mine.parquet")
    table = read_parquet(tmp_path / "out" / "mine.parquet")
    assert table.to_pylist() == [{"b": "x", "a": {"n": 1}, "c": None}, {"b": "y", "a": {"n": 2.5}, "c": None}]


def test_a_byte_order_mark_and_line_separators_inside_texts_are_no_trouble(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps({"x": "a\u2028b"}, ensure_ascii=False).encode()
        + b"\r\n"
        + b'{"x": "\\u2028"}'
    )
    assert rows_of(tmp_path / "rows.jsonl", tmp_path) == [{"x": "a\u2028b"}, {"x": "\u2028"}]


def test_a_hidden_file_is_read_if_it_is_named(tmp_path):
    (tmp_path / ".rows.json").write_text('[{"x": 1}]')
    assert rows_of(tmp_path / ".rows.json", tmp_path) == [{"x": 1}]


def test_a_folder_of_parquet_files_is_one_table(tmp_path):
    (tmp_path / "in" / ".cache").mkdir(parents=True)
    pq.write_table(pa.table({"x": ["a", "b"]}), tmp_path / "in" / "train-0.parquet")
    pq.write_table(pa.table({"x": ["c"], "y": [1]}), tmp_path / "in" / "train-1.parquet")
    (tmp_path / "in" / ".cache" / "junk.json").write_text("{")
    (tmp_path / "in" / ".rows.json").write_text("{")
    (tmp_path / "in" / "README.md").write_text("two shards")
    assert rows_of(tmp_path / "in", tmp_path) == [
        {"x": "a", "y": None},
        {"x": "b", "y": None},
        {"x": "c", "y": 1},
    ]
    pq.write_table(pa.table({"x": [1.5]}), tmp_path / "in" / "train-2.parquet")
    with pytest.raises(InputError, match="mine: its files have columns of different types"):
        rows_of(tmp_path / "in", tmp_path)


@pytest.mark.parametrize("missed", ["b.jsonl.gz", "deep/b.CSV", "b.ndjson"])
def test_a_folder_with_rows_that_would_be_missed_is_refused(missed, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.JSONL").write_text('{"x": 1}')
    assert rows_of(tmp_path / "in", tmp_path) == [{"x": 1}]
    (tmp_path / "in" / missed).write_bytes(b"x")
    with pytest.raises(InputError, match=f"in: found {missed}, expected a file that ends in"):
        rows_of(tmp_path / "in", tmp_path)


@pytest.mark.parametrize(
    "name",
    ["b.jsonlines", "b.jl", "b.pq", "b.feather", "b.txt", "b.xlsx", "b.tgz", "b.jsonl-00001-of-2", "b"],
)
def test_a_file_that_would_be_missed_is_named(name, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"x": "y"}\n')
    for text in ("README.md", "LICENSE", "readme.txt", "load.py", ".gitattributes"):
        (folder / text).write_text("x")
    assert rows_of(folder, tmp_path) == [{"x": "y"}]
    (folder / name).write_text("x")
    with pytest.raises(InputError, match=rf"mine: found {name}, expected a file that ends in"):
        rows_of(folder, tmp_path)


@pytest.mark.parametrize(
    ("target", "expected"), [("more", "a link to a folder"), ("none", "a link to nothing")]
)
def test_a_link_that_is_not_followed_is_named(target, expected, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (tmp_path / "more").mkdir()
    (folder / "a.jsonl").write_text('{"x": "y"}\n')
    (folder / "link").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=f"mine/link: {expected}"):
        local_sha256(folder)


def test_a_row_of_another_kind_stays_in_its_place(tmp_path):
    rows = [
        {"turns": [{"from": "a"}], "n": 1},
        {"turns": "hello", "n": 2},
        {"turns": [{"from": "b"}], "n": True},
        {"turns": [["c"]], "n": 3},
        {"turns": [], "n": 4},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    stored = rows_of(tmp_path / "rows.json", tmp_path)
    assert [row["_invalid"] for row in stored] == [
        None,
        "rows.json, row 1: `turns` is a text, expected a list as in other rows",
        "rows.json, row 2: `n` is true or false, expected a number as in other rows",
        "rows.json, row 3: `turns[]` is a list, expected an object as in other rows",
        None,
    ]
    assert [row["n"] for row in stored] == [1, None, None, None, 4]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b"[]", "mine: the source has no rows"),
        ("a.jsonl", b"\n\n", "mine: the source has no rows"),
        ("a.json", b"", "a.json: not JSON"),
        ("a.json", b'[{"x": 1}', "a.json: not JSON"),
        ("a.json", b'{"x": 1}', "a.json: found an object, expected a list of rows"),
        (
            "a.json",
            b"[2, 3]",
            "a.json, row 0: the row is a number, expected an object with named columns; "
            "none of the 2 rows can be used",
        ),
        ("a.jsonl", b"<html>\n</html>", "a.jsonl: not JSON: found a page of HTML or XML"),
        ("a.json", b'[{"x": "\xff"}]', "a.json, row 0: `x` holds the byte 0xff, which is not UTF-8"),
        ("a.json", b'[{"\\ud800": 1}]', "holds the lone surrogate U+D800"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.parquet", b"PAR1", "a.parquet: not a whole Parquet file"),
        ("a.csv", b"x", "a.csv: expected a file that ends in .json"),
    ],
)
def test_a_broken_source_is_named_and_nothing_is_left(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        tables.run("mine", source(tmp_path / name), tmp_path / "out" / "mine.parquet")
    assert expected in str(error.value)
    assert list(tmp_path.glob("out/*")) == []


def test_a_damaged_parquet_file_is_named(tmp_path):
    pq.write_table(
        pa.table({"x": ["some text"] * 1000}),
        tmp_path / "a.parquet",
        compression="none",
        use_dictionary=False,
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:40] = b"\xff" * 36
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: not a whole Parquet file .*correct the source"):
        tables.run("mine", source(tmp_path / "a.parquet"), tmp_path / "out" / "mine.parquet")
    assert list(tmp_path.glob("out/*")) == []


def test_every_instruction_row_of_the_package_keeps_its_columns(tmp_path):
    sources = params_file.load(ROOT / "params.yaml").data.sft.sources
    tables.run("alpaca_demo", sources["alpaca_demo"].source, tmp_path / "alpaca_demo.parquet")
    table = read_parquet(tmp_path / "alpaca_demo.parquet")
    assert (table.num_rows, sorted(table.column_names)) == (999, ["input", "instruction", "output"])
    assert table.slice(1, 1).to_pylist()[0]["output"] == "The car accelerated rapidly."


def test_every_pair_of_the_package_is_a_prompt_and_two_completions(tmp_path):
    sources = params_file.load(ROOT / "params.yaml").data.preferences.sources
    tables.run("dpo_demo", sources["dpo_demo"].source, tmp_path / "dpo_demo.parquet")
    rows = read_parquet(tmp_path / "dpo_demo.parquet").to_pylist()
    assert len(rows) == 300 and sorted(rows[0]) == ["chosen", "conversations", "rejected"]
    for row in rows:
        prompt, chosen, rejected = to_pair(row, "sharegpt")
        assert prompt.turns[-1]["role"] == "user" and chosen["role"] == rejected["role"] == "assistant"
