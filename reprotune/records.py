"""The JSON, CSV and Parquet files that stages write: same content, same bytes.

Keys are sorted, floats have ten significant digits, and a file is replaced in one step.
"""

import csv
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from reprotune.errors import InputError, first_line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which takes `path`'s place on success and is removed on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to; it takes `folder`'s place on success and is removed on error."""
    temporary = folder.with_name(f".{folder.name}.new")
    # what a killed run left
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rounded(value: Any) -> Any:
    """`value` with every float cut to ten significant digits; NaN and infinity are errors."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a record holds {value}, expected a finite number")
        return float(f"{value:.10g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, record: Any) -> None:
    write_text(
        path,
        json.dumps(rounded(record), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n",
    )


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); `dvc repro` makes it anew") from error


def write_metrics(path: Path, headline: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Write a DVC metrics file: `dvc metrics` shows the headline and leaves out `details`, a list."""
    write_json(path, {**headline, "details": [details]})


def read_metrics(path: Path) -> dict[str, Any]:
    """The headline and the details of a metrics file in one."""
    record = read_json(path)
    try:
        (details,) = record.pop("details")
        return record | details
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not a metrics file of this version ({first_line(error)}); `dvc repro` makes it anew"
        ) from error


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: list[str]) -> None:
    """Write `rows` under a header of `columns`, in that order; a missing or extra key is an error."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            assert set(row) == set(columns), f"{path}: row has {sorted(row)}, expected {sorted(columns)}"
            writer.writerow(rounded(row))


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    """Write one row a dict.

    Without a schema, types follow from all rows: a mixed column is an error, a missing key a null.
    """
    if schema is None:
        columns = dict.fromkeys(key for row in rows for key in row)
        rows = [{key: row.get(key) for key in columns} for row in rows]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")


MADE_ANEW = "`dvc checkout` restores it, `dvc repro` makes it anew"


@contextmanager
def parquet_file(path: Path, advice: str = MADE_ANEW) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; what the `with` block cannot read of it is an InputError with this advice."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file ({first_line(error)}); {advice}") from error


def read_parquet(path: Path, advice: str = MADE_ANEW) -> pa.Table:
    with parquet_file(path, advice) as file:
        return file.read()


def digest(file: Path) -> str:
    """xxh3 of a file's content, 32 hex digits; it detects accidents, not forgery."""
    hasher = xxhash.xxh3_128()
    with file.open("rb") as content:
        while block := content.read(2**22):
            hasher.update(block)
    return hasher.hexdigest()
