"""The rows of a source as one Parquet table, with its own columns in its own order."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reprotune.data.file_forms import form_of
from reprotune.data.json_rows import json_table
from reprotune.data.sources import CORRECT, fetched, files_in
from reprotune.errors import InputError, first_line
from reprotune.params import Source
from reprotune.records import parquet_file, replacing

ROW_FILES = (".json", ".jsonl", ".parquet")
NO_ROWS = (".cff", ".gif", ".html", ".ini", ".jpg", ".lock", ".md", ".pdf", ".png", ".py", ".pyc", ".rst",
    ".sh", ".svg", ".toml", ".yaml", ".yml")  # fmt: skip
"""Endings of files that hold no rows. Any other file in a folder is refused: its rows would be missed."""
TEXTS = (
    "authors",
    "changelog",
    "citation",
    "license",
    "licence",
    "notice",
    "readme",
    "sha256sums",
    "version",
)
"""Names of texts, without their endings."""
ROW_GROUP = 10_000
"""Rows of a Parquet file in memory at once, when a table is written or read. JSON files are read whole."""


def run(name: str, source: Source, out: Path) -> None:
    with fetched(source) as path:
        count = write_table(path, out, name)
    print(f"{name}: {count:,} rows")


def write_table(path: Path, out: Path, name: str) -> int:
    """Write the rows of a file, or of all row files in a folder, as one table; returns how many there are."""
    files = row_files(path)
    json_tables = {file: json_table(file) for file in files if not is_parquet(file)}
    schema = common_schema(
        [json_tables[file].schema if file in json_tables else parquet_schema(file) for file in files], name
    )
    count = 0
    with replacing(out) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for file in files:
            for table in [json_tables[file]] if file in json_tables else parquet_tables(file):
                writer.write_table(fitted(table, schema, file, name), row_group_size=ROW_GROUP)
                count += table.num_rows
        if count == 0:
            raise InputError(f"{name}: the source has no rows; correct its `path` or `files` in params.yaml")
    return count


def row_files(path: Path) -> list[Path]:
    """The file, or the files of a folder that hold rows, without hidden ones.

    Raises:
        InputError: there is none, or a folder has rows in a form that would be missed.
    """
    seen = [path]
    if path.is_dir():
        seen = files_in(path)
    files = [file for file in seen if file.suffix.lower() in ROW_FILES]
    others = [file for file in seen if file not in files and file.suffix.lower() not in NO_ROWS]
    missed = [str(file.relative_to(path)) for file in others if file.stem.lower() not in TEXTS]
    if missed or not files:
        what = f"found {missed[0]}, " if path.is_dir() and missed else ""
        raise InputError(
            f"{path.name}: {what}expected a file that ends in {', '.join(ROW_FILES)}, or a folder with some; "
            "write its rows as one of these, or correct `path` or `files` in params.yaml"
        )
    return files


def is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def common_schema(schemas: Sequence[pa.Schema], name: str) -> pa.Schema:
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(
            f"{name}: its files have columns of different types ({first_line(error)}); "
            "name them as sources of their own"
        ) from error


def fitted(table: pa.Table, schema: pa.Schema, file: Path, name: str) -> pa.Table:
    try:
        return pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"{file.name}: its values do not fit the columns of all files of {name} ({first_line(error)}); "
            "name it as a source of its own"
        ) from error


def parquet_tables(file: Path) -> Iterator[pa.Table]:
    with parquet_file(file, CORRECT) as table:
        for batch in table.iter_batches(ROW_GROUP):
            yield pa.Table.from_batches([batch])


def parquet_schema(file: Path) -> pa.Schema:
    with file.open("rb") as opened:
        form, advice = form_of(opened.read(100))
    if form not in ("", "Parquet"):
        raise InputError(
            f"{file.name}: not Parquet: found {form}; {advice}, or correct `path` in params.yaml"
        )
    with parquet_file(file, CORRECT) as table:
        return table.schema_arrow.remove_metadata()
