"""The rows of a .json or .jsonl file as an Arrow table.

A row that no table can hold keeps its place as an empty row, with the reason in its column INVALID.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from reprotune.data.file_forms import form_of, table_form
from reprotune.data.raw_rows import INVALID
from reprotune.errors import InputError, first_line

MAX_DEPTH = 16
"""Levels of nested lists and objects in a column; Parquet's own reader gives up at about 50."""

TEXT_SHARE = 0.1
"""Texts in a column of numbers from which on the numbers are what is odd: formats read texts."""
NO_NUMBER = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""What Python reads that JSON does not have, by Python's name for it."""
AS_JSON = ("tools", "tool_calls", "function_call")
"""Keys of objects that are stored as JSON: their arguments differ in keys and kinds from row to row."""
SPACE = re.compile(r"[ \t\n\r]*")
LINE_BREAK = re.compile(r"\r\n|\r|\n")

Kinds = dict[str, str]
"""What each value of a row is, by its path in the row."""


class Unstorable(ValueError):
    """A value that no table can hold."""


def json_table(file: Path) -> pa.Table:
    """A file with a list of objects, or with objects one after another."""
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
    """Each row's value: of a list, or of values one after another, as in JSON Lines, whatever the name says.

    A line that is not JSON among lines that are becomes Unstorable.
    """
    text = json_text(file)
    if not text.strip() and not is_lines(file):
        raise InputError(f"{file.name}: not JSON: found an empty file; correct `path` in params.yaml")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield from consecutive(text, file, error)
        return
    if isinstance(whole, list):
        yield from whole
    elif isinstance(whole, dict) and is_lines(file):
        yield whole
    else:
        raise InputError(f"{file.name}: found {kind(whole)}, expected a list of rows{hint(whole)}")


def is_lines(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def json_text(file: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Bytes that are not UTF-8 become lone surrogates, which `storable` refuses.
    """
    content = file.read_bytes()
    form, advice = form_of(content)
    if form and form != "JSON":
        raise InputError(f"{file.name}: not JSON: found {form}; {advice}, or correct `path` in params.yaml")
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file.name}: not JSON: found text that is {encoding.upper()} at its start alone ({error}); "
            "write it as UTF-8, or correct `path` in params.yaml"
        ) from error


def consecutive(text: str, file: Path, error: Exception) -> Iterator[Any]:
    """Values one after another; where one of them is broken, the value of each line.

    Raises:
        InputError: not most of the lines are objects either.
    """
    try:
        yield from list(decoded(text))
        return
    except (ValueError, RecursionError):
        # a line break inside of a text is escaped in JSON
        lines = [(number, line) for number, line in enumerate(LINE_BREAK.split(text), 1) if line.strip()]
    values = [line_value(number, line) for number, line in lines]
    if 2 * sum(isinstance(value, dict) for value in values) > len(values):
        yield from values
        return
    if form := table_form(text):
        found = f"found {form}; write its rows as JSON, as pandas' to_json(orient='records') does"
    else:
        broken = next((value for value in values if isinstance(value, Unstorable)), error)
        some = any(isinstance(value, dict) for value in values)
        found = f"{broken if some else error}; correct the file"
    raise InputError(f"{file.name}: not JSON: {found}, or its `path` in params.yaml") from error


def decoded(text: str) -> Iterator[Any]:
    decoder, place = json.JSONDecoder(), 0
    while (place := SPACE.match(text, place).end()) < len(text):  # type: ignore[union-attr]
        value, place = decoder.raw_decode(text, place)
        yield value


def line_value(number: int, line: str) -> Any:
    try:
        return json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return Unstorable(f"line {number} is not JSON ({error})")


def hint(value: Any) -> str:
    """What to do about a value that should be a list of rows."""
    if isinstance(value, dict):
        for key, rows in value.items():
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                return f"; it has {len(rows)} objects under `{key}`: `jq '.\"{key}\"'` writes that list"
        if value and all(isinstance(column, dict | list) for column in value.values()):
            return "; it has columns: pandas' to_json(orient='records') writes rows"
    return "; put one row into a list, or give the file a name that ends in .jsonl"


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
    as_json = isinstance(value, dict | list) and path.split(".")[-1] in AS_JSON
    if value is None or value == {} or (as_json and not value):
        return None
    if as_json:
        value = json.dumps(value, ensure_ascii=False)
    if not alike(kinds.setdefault(path, kind(value)), kind(value)):
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
    if isinstance(value, float) and not math.isfinite(value):
        return NO_NUMBER[str(value)]
    names = {str: "a text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def alike(first: str, second: str) -> bool:
    """Whether one column can hold both kinds."""
    return first == second or {first, second} <= {"a number", *NO_NUMBER.values()}


def mark_odd_rows(rows: list[dict[str, Any]], kinds: Sequence[Kinds], file: Path) -> None:
    """Replace each row with a value of another kind than its column has."""
    usual = usual_kinds(kinds)
    for number, row_kinds in enumerate(kinds):
        odd = next((path for path, found in row_kinds.items() if not alike(found, usual[path])), None)
        if odd is not None:
            found = row_kinds[odd]
            advice = "; JSON has no such number: null is for a value that is missing"
            rows[number] = {
                INVALID: f"{file.name}, row {number}: `{odd}` is {found}, expected {usual[odd]} as in other "
                f"rows{advice if found in NO_NUMBER.values() else ''}"
            }


def usual_kinds(kinds: Sequence[Kinds]) -> Kinds:
    """For each path the kind that most rows have; of two as frequent, the one that came first.

    NaN and the like count only where a column has nothing else.
    """
    counts: dict[str, Counter[str]] = {}
    for row_kinds in kinds:
        for path, value_kind in row_kinds.items():
            counts.setdefault(path, Counter())[value_kind] += 1
    usual = {}
    for path, counter in counts.items():
        values = Counter({name: count for name, count in counter.items() if name not in NO_NUMBER.values()})
        (most, _), *_ = (values or counter).most_common(1)
        texts = values["a text"]
        of_texts = most in ("a number", "true or false") and texts >= TEXT_SHARE * values.total() and texts
        usual[path] = "a text" if of_texts else most
    return usual
