"""A chunk of raw rows to tokens: conversion, checks, tokenization and truncation of each row."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import pyarrow as pa

from reprotune.data import duplicates, spool
from reprotune.data.accounting import Reason
from reprotune.data.chat_tokens import ChatTokens, Tokens
from reprotune.data.conversations import Conversation
from reprotune.data.raw_rows import InvalidRow, NoPreference, rows_of
from reprotune.data.row_kinds import Kind, LeftOut


@dataclass
class RowArrays:
    """What tokenizing finds out about each row: arrays with one entry a row, 0 where nothing applies."""

    reason: np.ndarray
    tokens: np.ndarray
    """Before truncation."""
    lengths: np.ndarray
    """Shape (rows, columns): the length of each column, after truncation."""
    label_tokens: np.ndarray
    digests: np.ndarray
    prompt_digests: np.ndarray
    signatures: np.ndarray
    """Shape (rows, duplicates.PERMUTATIONS), or (0, …) where near-duplicates stay."""
    prompt_signatures: np.ndarray
    """The same for prompts."""

    @classmethod
    def zeros(cls, rows: int, kind: Kind, signatures: bool) -> Self:
        return cls(
            reason=np.zeros(rows, np.uint8),
            tokens=np.zeros(rows, np.int32),
            lengths=np.zeros((rows, len(kind.columns)), np.int32),
            label_tokens=np.zeros(rows, np.int32),
            digests=np.zeros(rows, f"V{duplicates.DIGEST_BYTES}"),
            prompt_digests=np.zeros(rows, f"V{duplicates.DIGEST_BYTES}"),
            signatures=np.zeros((rows if signatures else 0, duplicates.PERMUTATIONS), np.uint32),
            prompt_signatures=np.zeros((rows if signatures else 0, duplicates.PERMUTATIONS), np.uint32),
        )

    def put(self, start: int, chunk: "RowArrays") -> None:
        """Copy a chunk's entries to those from `start` on."""
        for array in fields(self):
            entries = getattr(chunk, array.name)
            getattr(self, array.name)[start : start + len(entries)] = entries


@dataclass
class Chunk:
    rows: RowArrays
    details: dict[int, str] = field(default_factory=dict)
    """Why a row is left out, by its index."""
    tokens: bytes = b""
    """The kept rows' columns one after another, as the spool holds them."""

    def leave_out(self, index: int, reason: Reason, detail: str) -> None:
        self.rows.reason[index] = reason
        self.details[index] = detail


@dataclass(frozen=True)
class Preparer:
    """Turns raw rows into tokens, in the same way for all chunks."""

    kind: Kind
    chat: ChatTokens
    special: re.Pattern[str]
    """Matches the tokens that no text may hold."""
    max_length: int
    overlong: str
    signatures: bool
    """Whether near-duplicates are searched for."""

    def prepare(self, batch: pa.RecordBatch, format_name: str, ignore: Sequence[str]) -> Chunk:
        """Convert and tokenize some rows of one source."""
        chunk = Chunk(RowArrays.zeros(batch.num_rows, self.kind, self.signatures))
        converted = self.converted(batch, format_name, ignore, chunk)
        columns = []
        for (index, item), row in zip(
            converted.items(), self.tokenized(list(converted.values())), strict=True
        ):
            if isinstance(row, LeftOut):
                chunk.leave_out(index, *row)
                continue
            chunk.rows.tokens[index] = sum(len(row[column]) for column in self.kind.token_columns)
            fitted = self.kind.fit(row, self.max_length, self.overlong)
            if isinstance(fitted, LeftOut):
                chunk.leave_out(index, *fitted)
                continue
            self.describe(chunk.rows, index, item, fitted)
            columns += [fitted[column] for column in self.kind.columns]
        chunk.tokens = spool.encoded(columns)
        return chunk

    def converted(
        self, batch: pa.RecordBatch, format_name: str, ignore: Sequence[str], chunk: Chunk
    ) -> dict[int, Any]:
        """The rows that are valid, by index; the others leave the chunk."""
        valid = {}
        for index, row in enumerate(rows_of(batch)):
            try:
                item = self.kind.convert(row, format_name, ignore)
                text = "\n".join(self.kind.texts(item))
                check_unicode(text)
                if match := self.special.search(text):
                    raise InvalidRow(
                        f"a text holds {match[0]!r}, "
                        "which would be read as the token that the template writes"
                    )
                valid[index] = item
            except NoPreference as error:
                chunk.leave_out(index, Reason.NO_PREFERENCE, str(error))
            except InvalidRow as error:
                chunk.leave_out(index, Reason.INVALID, str(error))
        return valid

    def tokenized(self, items: list[Any]) -> list[Tokens | LeftOut]:
        """The tokens of each item. Halves a batch that the template fails on, to find the items at fault."""
        try:
            return list(self.kind.tokenize(self.chat, items))
        except InvalidRow as error:
            if len(items) == 1:
                return [LeftOut(Reason.INVALID, str(error))]
            half = len(items) // 2
            return self.tokenized(items[:half]) + self.tokenized(items[half:])

    def describe(self, rows: RowArrays, index: int, item: Any, tokens: Tokens) -> None:
        """Fill in the entries of a kept row."""
        kind, prompt = self.kind, in_any_form(self.kind.prompt(item).said())
        rows.digests[index] = np.void(duplicates.digest(duplicates.normalized(kind.identity(item))))
        rows.prompt_digests[index] = np.void(duplicates.digest(prompt))
        if self.signatures:
            rows.signatures[index] = duplicates.signature(duplicates.normalized(kind.said(item)))
            rows.prompt_signatures[index] = duplicates.signature(prompt)
        rows.lengths[index] = [len(tokens[column]) for column in self.kind.columns]
        rows.label_tokens[index] = self.kind.labels(tokens)


def check_unicode(text: str) -> None:
    """Raise InvalidRow for what JSON in a text can hold, and no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InvalidRow(f"a text holds the lone surrogate U+{code:04X}, expected Unicode") from error


def in_any_form(prompt: Conversation) -> str:
    """A prompt's normalized text, the same if a format has it in parts, as Alpaca's instruction and input."""
    return duplicates.normalized([" ".join(prompt.texts())])
