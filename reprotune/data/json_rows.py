"""The rows of a .json or .jsonl file as an Arrow table.

A row that no table can hold keeps its place as an empty row, with the reason in its column INVALID.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from reprotune.data.raw_rows import INVALID
from reprotune.errors import InputError, first_line

MAX_DEPTH = 16
"""Levels of nested lists and objects in a column; Parquet's own reader gives up at about 50."""

Kinds = dict[str, str]
"""What each value of a row is, by its path in the row."""


class Unstorable(ValueError):
    """A value that no table can hold."""


def json_table(file: Path) -> pa.Table:
    """A .json file (a list of objects) or a .jsonl file (an object a line)."""
    rows: list[dict[str, Any]] = []
    kinds: list[Kinds] = []
    for number, value in enumerate(json_values(file)):
        row_kinds: Kinds = {}
        try:
            row = storable_row(value, row_kinds)
        except Unstorable as error:
            row, row_kinds = {INVALID: f"{file.name}, row {number}: {error}"}, {}
        rows.append(row)
        kinds.append(row_kinds)
    mark_odd_rows(rows, kinds, file)
    reasons = [row[INVALID] for row in rows if INVALID in row]
    if rows and len(reasons) == len(rows):
        raise InputError(
            f"{reasons[0]}; none of the {len(rows)} rows can be used: "
            "correct the file or its `path` in params.yaml"
        )
    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        return pa.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"{file.name}: its rows make no table ({first_line(error)}); give each column values of one type"
        ) from error


def json_values(file: Path) -> Iterator[Any]:
    """Each row's value; a line that is not JSON becomes Unstorable.

    Bytes that are not UTF-8 become lone surrogates, which `storable` refuses.
    """
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            values = json.loads(content.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{file.name}: not JSON ({error}); correct the file or its `path` in params.yaml"
            ) from error
        if not isinstance(values, list):
            raise InputError(f"{file.name}: found {kind(values)}, expected a list of rows")
        yield from values
        return
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                yield Unstorable(f"line {number} is not JSON ({error})")


def storable_row(value: Any, kinds: Kinds) -> dict[str, Any]:
    """The row as a table holds it; see `storable`."""
    if isinstance(value, Unstorable):
        raise value
    if not isinstance(value, dict):
        raise Unstorable(f"the row is {kind(value)}, expected an object with named columns")
    return {unicode(key, key): storable(item, key, kinds) for key, item in value.items()}


def storable(value: Any, path: str, kinds: Kinds, depth: int = 0) -> Any:
    """The value as a table holds it; adds the kind of everything in it to `kinds`.

    Raises:
        Unstorable: invalid Unicode, a number beyond 64 bits, a list of several kinds, or deep nesting.
    """
    if depth > MAX_DEPTH:
        raise Unstorable(f"`{path.split('.')[0].split('[')[0]}` is more than {MAX_DEPTH} levels deep")
    if value is None or value == {}:
        return None
    if kinds.setdefault(path, kind(value)) != kind(value):
        raise Unstorable(f"`{path}` holds {kinds[path]} and {kind(value)}")
    if isinstance(value, str):
        return unicode(value, path)
    if isinstance(value, dict):
        return {
            unicode(key, path): storable(item, f"{path}.{key}", kinds, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [storable(item, f"{path}[]", kinds, depth + 1) for item in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise Unstorable(f"`{path}` is a number beyond 64 bits")
    return value


def unicode(string: str, path: str) -> str:
    try:
        string.encode()
    except UnicodeEncodeError as error:
        code = ord(string[error.start])
        # surrogateescape decodes the byte b to U+DC00 + b
        if 0xDC80 <= code <= 0xDCFF:
            character = f"the byte {code - 0xDC00:#04x}, which is not UTF-8"
        else:
            character = f"the lone surrogate U+{code:04X}"
        raise Unstorable(f"`{ascii(path)[1:-1]}` holds {character}") from error
    return string


def kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def mark_odd_rows(rows: list[dict[str, Any]], kinds: Sequence[Kinds], file: Path) -> None:
    """Replace each row with a value of another kind than most rows have at its path."""
    usual = usual_kinds(kinds)
    for number, row_kinds in enumerate(kinds):
        odd = next((path for path, value_kind in row_kinds.items() if value_kind != usual[path]), None)
        if odd is not None:
            rows[number] = {
                INVALID: f"{file.name}, row {number}: `{odd}` is {row_kinds[odd]}, "
                f"expected {usual[odd]} as in most rows"
            }


def usual_kinds(kinds: Sequence[Kinds]) -> Kinds:
    """For each path the kind that most rows have; of two as frequent, the one that came first."""
    counts: dict[str, Counter[str]] = {}
    for row_kinds in kinds:
        for path, value_kind in row_kinds.items():
            counts.setdefault(path, Counter())[value_kind] += 1
    return {path: counter.most_common(1)[0][0] for path, counter in counts.items()}
