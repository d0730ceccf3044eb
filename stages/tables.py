"""Rows of .json, .jsonl and Parquet files as Parquet tables with the source's own columns, in the source's own order.

A row that no table can hold (broken JSON, bytes that are not UTF-8, a text where all others have a list) stays in its place
as an empty one whose column `_invalid` says why, so that the ledger can count it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages import InputError, first_line
from stages.formats import INVALID
from stages.params import PreferenceSource, SftSource
from stages.records import filling, parquet_file, replacing
from stages.sources import fetched

ROW_FILES = (".json", ".jsonl", ".parquet")
ROW_GROUP = 10_000
"""Rows of a Parquet file that are in memory at once when a table is written or read. JSON files are read whole."""
DEPTH = 16
"""How deep lists and objects may lie in each other; Parquet's own reader gives up at about 50."""

CORRECT = "correct the source, or its `path` or `files` in params.yaml"

Kinds = dict[str, str]
"""Path of a value within its row to what it is."""


class Unstorable(ValueError):
    """A value that no table can hold."""


def fetch_tables(sources: Mapping[str, SftSource | PreferenceSource], out: Path) -> None:
    """Write each source as `out/<name>.parquet`."""
    with filling(out) as folder:
        for name in sorted(sources):
            with fetched(sources[name].source) as path:
                count = write_table(path, folder / f"{name}.parquet", name)
            print(f"{name}: {count:,} rows")


def write_table(path: Path, out: Path, name: str) -> int:
    """Write the rows of a file, or of all such files in a folder, as one table; returns how many there are."""
    files = row_files(path)
    tables = {file: json_table(file) for file in files if file.suffix != ".parquet"}
    schemas = [tables[file].schema if file in tables else parquet_schema(file) for file in files]
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{name}: its files have columns of different types ({first_line(error)}); name them as sources of their own") from error
    count = 0
    with replacing(out) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for file in files:
            for table in [tables[file]] if file in tables else batches(file):
                try:
                    fitting = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
                except pa.ArrowException as error:
                    raise InputError(f"{file.name}: its values do not fit the columns of all files of {name} ({first_line(error)}); name it as a source of its own") from error
                writer.write_table(fitting, row_group_size=ROW_GROUP)
                count += table.num_rows
    if count == 0:
        raise InputError(f"{name}: the source has no rows; correct its `path` or `files` in params.yaml")
    return count


def row_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in ROW_FILES and ".cache" not in file.relative_to(path).parts)
    else:
        found = [path] if path.suffix in ROW_FILES else []
    if not found:
        raise InputError(f"{path.name}: expected a file that ends in {', '.join(ROW_FILES)}, or a folder with some")
    return found


def batches(file: Path) -> Iterator[pa.Table]:
    with parquet_file(file, CORRECT) as table:
        for batch in table.iter_batches(ROW_GROUP):
            yield pa.Table.from_batches([batch])


def parquet_schema(file: Path) -> pa.Schema:
    with parquet_file(file, CORRECT) as table:
        return table.schema_arrow.remove_metadata()


def json_table(file: Path) -> pa.Table:
    """A .json file (a list of objects) or a .jsonl file (an object a line)."""
    rows: list[dict[str, Any]] = []
    kinds: list[Kinds] = []
    for number, found in enumerate(json_values(file)):
        known: Kinds = {}
        try:
            if isinstance(found, Unstorable):
                raise found
            if not isinstance(found, dict):
                raise Unstorable(f"the row is {kind(found)}, expected an object with named columns")
            row = {unicode(key, key): storable(value, key, known) for key, value in found.items()}
        except Unstorable as error:
            row, known = {INVALID: f"{file.name}, row {number}: {error}"}, {}
        rows.append(row)
        kinds.append(known)
    usual = usual_kinds(kinds)
    for number, known in enumerate(kinds):
        odd = next((path for path, found in known.items() if found != usual[path]), None)
        if odd is not None:
            rows[number] = {INVALID: f"{file.name}, row {number}: `{odd}` is {known[odd]}, expected {usual[odd]} as in most rows"}
    bad = [row[INVALID] for row in rows if INVALID in row]
    if rows and len(bad) == len(rows):
        raise InputError(f"{bad[0]}; none of the {len(rows)} rows can be used: correct the file or its `path` in params.yaml")
    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        return pa.Table.from_pylist([{key: row.get(key) for key in columns} for row in rows])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{file.name}: its rows make no table ({first_line(error)}); give each column values of one type") from error


def json_values(file: Path) -> Iterator[Any]:
    """Each row's value. Bytes that are not UTF-8 become lone surrogates, which no table holds; a bad line becomes Unstorable."""
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            found = json.loads(content.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file.name}: not JSON ({error}); correct the file or its `path` in params.yaml") from error
        if not isinstance(found, list):
            raise InputError(f"{file.name}: found {kind(found)}, expected a list of rows")
        yield from found
        return
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                yield Unstorable(f"line {number} is not JSON ({error})")


def storable(value: Any, path: str, known: Kinds, depth: int = 0) -> Any:
    """The value as a table holds it; adds the kind of everything in it to `known`.

    Raises:
        Unstorable: text that is not Unicode, a number beyond 64 bits, a list with values of several kinds, or too deep a value.
    """
    if depth > DEPTH:
        raise Unstorable(f"`{path.split('.')[0].split('[')[0]}` is more than {DEPTH} levels deep")
    if value is None or value == {}:
        return None
    if known.setdefault(path, kind(value)) != kind(value):
        raise Unstorable(f"`{path}` holds {known[path]} and {kind(value)}")
    if isinstance(value, str):
        return unicode(value, path)
    if isinstance(value, dict):
        return {unicode(key, path): storable(item, f"{path}.{key}", known, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [storable(item, f"{path}[]", known, depth + 1) for item in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise Unstorable(f"`{path}` is a number beyond 64 bits")
    return value


def unicode(string: str, path: str) -> str:
    try:
        string.encode()
    except UnicodeEncodeError as error:
        code = ord(string[error.start])
        found = f"the byte {code - 0xDC00:#04x}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
        raise Unstorable(f"`{ascii(path)[1:-1]}` holds {found}") from error
    return string


def kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def usual_kinds(kinds: list[Kinds]) -> Kinds:
    """For each path the kind that most rows have, the first one found if two are as frequent."""
    counts: dict[str, Counter[str]] = {}
    for known in kinds:
        for path, found in known.items():
            counts.setdefault(path, Counter())[found] += 1
    return {path: counter.most_common(1)[0][0] for path, counter in counts.items()}
