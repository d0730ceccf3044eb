"""What a file is whose name says something else, and what to do about it."""

import csv
import io
from itertools import islice

FORMS = (
    (b"\x1f\x8b", "gzip", "unpack it with `gunzip`"),
    (b"BZh", "bzip2", "unpack it with `bunzip2`"),
    (b"\xfd7zXZ\0", "xz", "unpack it with `unxz`"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unpack it with `unzstd`"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or export its table as JSON"),
    (b"PAR1", "Parquet", "give it a name that ends in .parquet"),
    (b"ARROW1", "Arrow", "write it as Parquet"),
    (b"version https://git-lfs.github.com/", "a Git LFS pointer", "`git lfs pull` brings the file itself"),
    (b"<", "a page of HTML or XML", "download the file itself"),
    (b"{", "JSON", "give it a name that ends in .json or .jsonl"),
    (b"[", "JSON", "give it a name that ends in .json or .jsonl"),
)
"""First bytes, the form that they show, and what to do."""
DELIMITERS = {"\t": "TSV", ",": "CSV", ";": "CSV"}


def form_of(content: bytes) -> tuple[str, str]:
    """The form that a file's first bytes show, and what to do; empty for none of FORMS."""
    start = content[:100].removeprefix(b"\xef\xbb\xbf").lstrip()
    return next(((form, advice) for magic, form, advice in FORMS if start.startswith(magic)), ("", ""))


def table_form(text: str) -> str:
    """TSV or CSV for a text whose first two rows have as many columns, and more than one; else empty."""
    # also JSON with record separators (RFC 7464)
    if form_of(text[:100].lstrip("\x1e").encode(errors="replace"))[0]:
        return ""
    lines = list(islice(filter(str.strip, io.StringIO(text)), 2))
    for delimiter, form in DELIMITERS.items():
        try:
            columns = [len(row) for row in csv.reader(lines, delimiter=delimiter)]
        except csv.Error:
            continue
        if len(columns) == 2 and columns[0] == columns[1] > 1:
            return form
    return ""
