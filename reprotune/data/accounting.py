"""What became of every raw row, and the budget for rows that are left out.

A row is trained on, held out, or left out for one reason: the first that applies, in the order of `Reason`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reprotune.errors import InputError
from reprotune.records import replacing


class Reason(IntEnum):
    """Why a row is left out; KEPT for one that is not."""

    KEPT = 0
    OVER_LIMIT = 1
    """Not taken from the source: `limit`."""
    INVALID = 2
    NO_PREFERENCE = 3
    OVERLONG = 4
    WITHOUT_LABELS = 5
    CONTAMINATED = 6
    DUPLICATE = 7
    NEAR_DUPLICATE = 8
    NOT_DRAWN = 9
    """Left out by a weight below 1."""

    @property
    def key(self) -> str:
        """Its name in metrics and in the list of dropped rows."""
        return self.name.lower()


BUDGETED = (Reason.INVALID, Reason.NO_PREFERENCE, Reason.OVERLONG, Reason.WITHOUT_LABELS)
"""Reasons that point to bad data, or to a limit that does not suit the data."""
UNTOKENIZED = (Reason.OVER_LIMIT, Reason.INVALID)
"""Reasons for which a row leaves before its tokens are counted."""
LISTED_IN_ERRORS = 5
"""Rows that an error message names."""
WRITE_BATCH = 10_000
"""Dropped rows that are written at once."""

DROPPED = pa.schema({"source": pa.string(), "row": pa.int64(), "reason": pa.string(), "detail": pa.string()})


@dataclass
class Rows:
    """All taken rows of all sources. An array has one entry a row."""

    names: Sequence[str]
    files: Sequence[Path]
    """Raw table of each source."""
    raw: Sequence[int]
    """Rows in each source's raw table."""
    source: np.ndarray
    """Index into `names`, `files` and `raw`."""
    number: np.ndarray
    """Row number in the source's raw table."""
    reason: np.ndarray
    details: dict[int, str]
    """Why a row was left out, in words, by its index."""
    tokens: np.ndarray
    """Before truncation."""
    kept_tokens: np.ndarray
    """After truncation; 0 for a row that is left out."""
    label_tokens: np.ndarray
    """Tokens that are trained on; 0 for a row that is left out."""
    seen: np.ndarray
    """How often an epoch trains on a row; 0 for one that is held out or left out."""

    def leave_out(self, indices: np.ndarray, reason: Reason, details: dict[int, str]) -> None:
        assert (self.reason[indices] == Reason.KEPT).all(), "a row is left out once"
        self.reason[indices] = reason
        self.kept_tokens[indices] = self.label_tokens[indices] = 0
        self.details |= details

    def where(self, index: int) -> str:
        return f"{self.files[self.source[index]]}, row {self.number[index]}"


def account(rows: Rows) -> dict[str, Any]:
    """Rows and tokens by reason, for each source and in total."""
    sources = [
        {"source": name} | part(rows, np.flatnonzero(rows.source == index), rows.raw[index])
        for index, name in enumerate(rows.names)
    ]
    return {"sources": sources, "total": [part(rows, np.arange(len(rows.source)), sum(rows.raw))]}


def part(rows: Rows, chosen: np.ndarray, raw: int) -> dict[str, dict[str, int]]:
    """The account of the rows at `chosen`, taken from `raw` rows."""
    return {"rows": row_counts(rows, chosen, raw), "tokens": token_counts(rows, chosen)}


def row_counts(rows: Rows, chosen: np.ndarray, raw: int) -> dict[str, int]:
    """`raw` is the sum of all others but `truncated` and `seen`."""
    reason, seen = rows.reason[chosen], rows.seen[chosen]
    kept = reason == Reason.KEPT
    counts = {code.key: int((reason == code).sum()) for code in Reason if code != Reason.KEPT}
    counts |= {
        "raw": raw,
        "over_limit": raw - len(chosen),
        "train": int((seen > 0).sum()),
        "held_out": int((kept & (seen == 0)).sum()),
    }
    assert raw == sum(count for name, count in counts.items() if name != "raw"), counts
    truncated = kept & (rows.kept_tokens[chosen] < rows.tokens[chosen])
    return counts | {"truncated": int(truncated.sum()), "seen": int(seen.sum())}


def token_counts(rows: Rows, chosen: np.ndarray) -> dict[str, int]:
    """`raw` is the sum of all others but `with_labels` and `seen`."""
    reason, seen = rows.reason[chosen], rows.seen[chosen]
    tokens, kept_tokens = rows.tokens[chosen], rows.kept_tokens[chosen]
    kept = reason == Reason.KEPT
    truncated = kept & (kept_tokens < tokens)
    counts = {
        code.key: int(tokens[reason == code].sum())
        for code in Reason
        if code != Reason.KEPT and code not in UNTOKENIZED
    }
    counts |= {
        "raw": int(tokens.sum()),
        "cut_off": int((tokens - kept_tokens)[truncated].sum()),
        "train": int(kept_tokens[seen > 0].sum()),
        "held_out": int(kept_tokens[kept & (seen == 0)].sum()),
    }
    assert counts["raw"] == sum(count for name, count in counts.items() if name != "raw"), counts
    labels = int(rows.label_tokens[chosen].sum())
    return counts | {"with_labels": labels, "seen": int((kept_tokens * seen).sum())}


def check_budget(rows: Rows, section: str, max_dropped: float) -> float:
    """The share of taken rows that are left out for a reason in BUDGETED.

    Raises:
        InputError: the share is above `max_dropped` in a source; names its first rows that are left out.
    """
    budgeted = np.isin(rows.reason, BUDGETED)
    for source, name in enumerate(rows.names):
        in_source = rows.source == source
        dropped = np.flatnonzero(in_source & budgeted)
        count = in_source.sum()
        if len(dropped) <= max_dropped * count:
            continue
        raise InputError(
            f"{section}.max_dropped: {len(dropped)} of {count} rows of {name} ({len(dropped) / count:.1%}) "
            f"are left out, expected at most {max_dropped:.1%}; correct the source or its `format`, "
            f"raise {section}.max_length, or raise the budget{first_left_out(rows, dropped)}"
        )
    return float(budgeted.mean())


def first_left_out(rows: Rows, indices: np.ndarray) -> str:
    """The end of an error message: how many of these rows each reason left out, and the first rows."""
    if not len(indices):
        return ""
    counts = {reason: int((rows.reason[indices] == reason).sum()) for reason in Reason}
    by_reason = ", ".join(f"{count} {reason.key}" for reason, count in counts.items() if count)
    first = "".join(
        f"\n  {rows.where(index)}: {Reason(rows.reason[index]).key}: {rows.details[index]}"
        for index in indices[:LISTED_IN_ERRORS]
    )
    return f". Left out: {by_reason}. The first:{first}"


def write_dropped(rows: Rows, file: Path) -> None:
    """List every row that is left out, with its reason."""
    dropped = np.flatnonzero(rows.reason != Reason.KEPT)
    with replacing(file) as temporary, pq.ParquetWriter(temporary, DROPPED, compression="zstd") as writer:
        for start in range(0, len(dropped), WRITE_BATCH):
            batch = dropped[start : start + WRITE_BATCH]
            columns = {
                "source": [rows.names[source] for source in rows.source[batch]],
                "row": rows.number[batch].astype(np.int64),
                "reason": [Reason(reason).key for reason in rows.reason[batch]],
                "detail": [rows.details[int(index)] for index in batch],
            }
            writer.write_table(pa.table(columns, schema=DROPPED))
