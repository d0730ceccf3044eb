"""What became of every raw row, and the budget for those that are left out.

A row leaves for one reason, the first that holds in the order of REASONS, and every row is in exactly one of them, held out, or
trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages import InputError
from stages.records import replacing

REASONS = (
    "kept", "over_limit", "invalid", "no_preference", "overlong", "without_labels", "contaminated", "duplicate", "near_duplicate", "not_drawn",
)  # fmt: skip
"""A row's reason is kept as its place here. over_limit: not taken from the source; not_drawn: left out by a weight below 1."""
KEPT, OVER_LIMIT, INVALID, NO_PREFERENCE, OVERLONG, WITHOUT_LABELS, CONTAMINATED, DUPLICATE, NEAR_DUPLICATE, NOT_DRAWN = range(len(REASONS))
BUDGETED = (INVALID, NO_PREFERENCE, OVERLONG, WITHOUT_LABELS)
"""Reasons that speak of the data's quality, or of a limit that does not suit it."""
SHOWN = 5
"""Rows that an error names."""
LISTED = 10_000
"""Rows that are written at once."""

DROPPED = pa.schema({"source": pa.string(), "row": pa.int64(), "reason": pa.string(), "detail": pa.string()})


@dataclass
class Rows:
    """All rows that were taken, an array entry each; `file` is the raw table that `number` counts in."""

    names: Sequence[str]
    files: Sequence[Path]
    raw: Sequence[int]
    """Rows that each source has."""
    source: np.ndarray
    number: np.ndarray
    reason: np.ndarray
    details: dict[int, str]
    """Why a row was left out, by its index."""
    tokens: np.ndarray
    """Before anything is cut off."""
    kept_tokens: np.ndarray
    label_tokens: np.ndarray
    """0 in both for a row that is not kept."""
    seen: np.ndarray
    """How often a row is trained on in an epoch; 0 for held-out rows and those that are not kept."""

    def leave(self, indices: np.ndarray, reason: int, details: dict[int, str]) -> None:
        assert (self.reason[indices] == KEPT).all(), "a row leaves once"
        self.reason[indices] = reason
        self.kept_tokens[indices] = self.label_tokens[indices] = 0
        self.details |= details

    def where(self, index: int) -> str:
        return f"{self.files[self.source[index]]}, row {self.number[index]}"


def account(rows: Rows) -> dict[str, Any]:
    """Rows and tokens by reason, per source and in total. raw is the sum of all others but `truncated` and `seen`."""
    sources = [{"source": name} | part(rows, np.flatnonzero(rows.source == index), rows.raw[index]) for index, name in enumerate(rows.names)]
    return {"sources": sources, "total": [part(rows, np.arange(len(rows.source)), sum(rows.raw))]}


def part(rows: Rows, chosen: np.ndarray, raw: int) -> dict[str, dict[str, int]]:
    reason, tokens, kept_tokens, seen = rows.reason[chosen], rows.tokens[chosen], rows.kept_tokens[chosen], rows.seen[chosen]
    kept = reason == KEPT
    counts = {name: int((reason == code).sum()) for code, name in enumerate(REASONS) if code != KEPT}
    counts |= {"raw": raw, "over_limit": raw - len(chosen), "train": int((seen > 0).sum()), "held_out": int((kept & (seen == 0)).sum())}
    assert raw == sum(value for name, value in counts.items() if name != "raw"), counts
    cut = kept & (kept_tokens < tokens)
    amounts = {name: int(tokens[reason == code].sum()) for code, name in enumerate(REASONS) if code not in (KEPT, OVER_LIMIT, INVALID)}
    amounts |= {
        "raw": int(tokens.sum()),
        "cut_off": int((tokens - kept_tokens)[cut].sum()),
        "train": int(kept_tokens[seen > 0].sum()),
        "held_out": int(kept_tokens[kept & (seen == 0)].sum()),
    }
    assert amounts["raw"] == sum(value for name, value in amounts.items() if name != "raw"), amounts
    amounts |= {"with_labels": int(rows.label_tokens[chosen].sum()), "seen": int((kept_tokens * seen).sum())}
    return {"rows": counts | {"truncated": int(cut.sum()), "seen": int(seen.sum())}, "tokens": amounts}


def check_budget(rows: Rows, section: str, max_dropped: float) -> float:
    """The share of taken rows that a budgeted reason took; raises InputError with the first of them if one source's is too large."""
    for source, name in enumerate(rows.names):
        own = rows.source == source
        dropped = np.flatnonzero(own & np.isin(rows.reason, BUDGETED))
        if len(dropped) <= max_dropped * own.sum():
            continue
        share = len(dropped) / own.sum()
        raise InputError(
            f"{section}.max_dropped: {len(dropped)} of {own.sum()} rows of {name} ({share:.1%}) are left out, expected at most "
            f"{max_dropped:.1%}; correct the source or its `format`, raise {section}.max_length, or raise the budget{first_left_out(rows, dropped)}"
        )
    return float(np.isin(rows.reason, BUDGETED).mean())


def first_left_out(rows: Rows, left: np.ndarray) -> str:
    """The end of a message: how many of these rows left for each reason, and the first of them."""
    if not len(left):
        return ""
    by_reason = ", ".join(f"{count} {name}" for code, name in enumerate(REASONS) if (count := int((rows.reason[left] == code).sum())))
    first = "".join(f"\n  {rows.where(index)}: {REASONS[rows.reason[index]]}: {rows.details[index]}" for index in left[:SHOWN])
    return f". Left out: {by_reason}. The first:{first}"


def write_dropped(rows: Rows, file: Path) -> None:
    """Every taken row that is neither trained on nor held out, with its reason."""
    left = np.flatnonzero(rows.reason != KEPT)
    with replacing(file) as temporary, pq.ParquetWriter(temporary, DROPPED, compression="zstd") as writer:
        for start in range(0, len(left), LISTED):
            chosen = left[start : start + LISTED]
            columns = {
                "source": [rows.names[source] for source in rows.source[chosen]],
                "row": rows.number[chosen].astype(np.int64),
                "reason": [REASONS[reason] for reason in rows.reason[chosen]],
                "detail": [rows.details[int(index)] for index in chosen],
            }
            writer.write_table(pa.table(columns, schema=DROPPED))
