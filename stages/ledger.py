"""Which rows are trained on, which are held out, and an account of every row that is neither."""

import random
from typing import Any

from stages import InputError
from stages.params import Tokenize


class Ledger:
    """Counts what becomes of each raw row: raw = empty + duplicate + overlong + over_limit + train + held_out."""

    def __init__(self, section: str) -> None:
        self.section = section
        self.record: dict[str, int | float] = dict.fromkeys(
            ("rows_raw", "rows_empty", "rows_duplicate", "rows_overlong", "rows_over_limit", "rows_train", "rows_held_out", "tokens_raw"), 0
        )
        self.seen: set[str] = set()

    def drop_empty(self) -> None:
        self.record["rows_raw"] += 1
        self.record["rows_empty"] += 1

    def takes(self, content: str, tokens: int, max_length: int) -> bool:
        """Count a row; False if an equal one came before it or it is longer than max_length tokens."""
        self.record["rows_raw"] += 1
        self.record["tokens_raw"] += tokens
        if content in self.seen:
            self.record["rows_duplicate"] += 1
            return False
        self.seen.add(content)
        if tokens > max_length:
            self.record["rows_overlong"] += 1
            return False
        return True

    def finished(self, max_dropped: float) -> dict[str, int | float]:
        """The record, once the share of empty and overlong rows is within the budget and the sum comes out."""
        record = self.record
        counted = sum(record[f"rows_{reason}"] for reason in ("empty", "duplicate", "overlong", "over_limit", "train", "held_out"))
        assert record["rows_raw"] == counted, record
        dropped = record["rows_empty"] + record["rows_overlong"]
        record["share_dropped"] = dropped / record["rows_raw"]
        if record["share_dropped"] > max_dropped:
            raise InputError(
                f"{self.section}.max_dropped: {dropped} of {record['rows_raw']} rows ({record['share_dropped']:.1%}) are dropped, "
                f"{record['rows_empty']} as empty and {record['rows_overlong']} as longer than {self.section}.max_length, "
                f"expected at most {max_dropped:.1%}; raise max_length, or the budget"
            )
        return record


def split(rows: list[Any], section: Tokenize, seed: int, ledger: Ledger) -> tuple[list[Any], list[Any]]:
    """Draw `limit` rows by seed and hold `held_out` of them back: train rows, held-out rows, each in source order."""
    limit = len(rows) if section.limit is None else section.limit
    if limit > len(rows) or section.held_out >= limit:
        raise InputError(
            f"{ledger.section}: {len(rows)} rows are left to draw from, expected at least limit ({section.limit}) and more "
            f"than held_out ({section.held_out}); lower them, or raise max_length"
        )
    drawn = random.Random(seed).sample(range(len(rows)), limit)
    held_out, train = sorted(drawn[: section.held_out]), sorted(drawn[section.held_out :])
    ledger.record |= {"rows_over_limit": len(rows) - limit, "rows_train": len(train), "rows_held_out": len(held_out)}
    return [rows[index] for index in train], [rows[index] for index in held_out]
