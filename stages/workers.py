"""Raw rows to tokens, a chunk at a time, in worker processes.

A chunk's result is a few arrays with an entry a row, and the kept rows' tokens; neither depends on the number of processes.
"""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from stages import InputError, duplicates, end_with_parent, ledger
from stages.formats import InvalidRow, NoPreference, conversation_texts, pair_texts, rows_of, to_conversation, to_pair
from stages.templating import IGNORED, load_tokenizer, special_pattern, tokenize, tokenize_pairs

CHUNK = 500
"""Rows that a worker takes at once."""

Tokens = dict[str, list[int]]
Left = tuple[int, str]
"""A reason of the ledger and its detail."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to know: picklable, and the same for all chunks."""

    kind: str
    base: Path
    template: Path
    max_length: int
    overlong: str
    signatures: bool


@dataclass
class Chunk:
    """What a worker gives back: arrays with an entry a row, and the kept rows' tokens one after another."""

    reason: np.ndarray
    details: dict[int, str]
    tokens: np.ndarray
    lengths: np.ndarray
    """Shape (rows, parts): tokens of input_ids and labels, or of prompt, chosen and rejected; 0 for a row that is not kept."""
    label_tokens: np.ndarray
    digests: np.ndarray
    signatures: np.ndarray
    data: bytes


def fit_example(row: Tokens, max_length: int, overlong: str) -> Tokens | Left:
    length = len(row["input_ids"])
    if length <= max_length:
        return row
    if overlong != "truncate":
        return ledger.OVERLONG, f"{length} tokens, max_length is {max_length}"
    row = {key: values[:max_length] for key, values in row.items()}
    if all(label == IGNORED for label in row["labels"]):
        return ledger.WITHOUT_LABELS, f"no answer within the first {max_length} of {length} tokens"
    return row


def fit_pair(row: Tokens, max_length: int, overlong: str) -> Tokens | Left:
    prompt, chosen, rejected = row.values()
    length = len(prompt) + max(len(chosen), len(rejected))
    if length > max_length:
        if overlong != "truncate":
            return ledger.OVERLONG, f"{length} tokens, max_length is {max_length}"
        if len(prompt) >= max_length:
            return ledger.WITHOUT_LABELS, f"no answer within max_length, {max_length} tokens: the prompt has {len(prompt)}"
        row = row | {key: row[key][: max_length - len(prompt)] for key in ("chosen_ids", "rejected_ids")}
    if row["chosen_ids"] == row["rejected_ids"]:
        return ledger.NO_PREFERENCE, "chosen and rejected have the same tokens"
    return row


@dataclass(frozen=True)
class Kind:
    """How instruction rows and preference pairs differ."""

    data: str
    """Its section of params.data."""
    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], str], Any]
    texts: Callable[[Any], list[str]]
    tokenize: Callable[..., list[Tokens]]
    fit: Callable[[Tokens, int, str], Tokens | Left]
    labels: Callable[[Tokens], int]


KINDS = {
    "sft": Kind(
        "sft", ("input_ids", "labels"), to_conversation, conversation_texts, tokenize, fit_example,
        lambda row: sum(label != IGNORED for label in row["labels"]),
    ),
    "dpo": Kind(
        "preferences", ("prompt_ids", "chosen_ids", "rejected_ids"), to_pair, pair_texts, tokenize_pairs, fit_pair,
        lambda row: len(row["chosen_ids"]) + len(row["rejected_ids"]),
    ),
}  # fmt: skip


def process_count(rows: int) -> int:
    """One a core, as far as each has enough to do to be worth its start."""
    return min(len(os.sched_getaffinity(0)), 1 + rows // (4 * CHUNK))


@contextmanager
def workers(task: Task, count: int) -> Iterator[Callable[[Iterator], Iterator[Chunk]]]:
    """Yield a function that maps `prepare` over chunks in order: here if there is one process, otherwise in a pool."""
    start_worker(task)
    if count == 1:
        yield lambda chunks: map(prepare, chunks)
        return
    # forked, a worker is ready at once and shares what is loaded, which the garbage collector must not touch
    gc.freeze()
    try:
        with ProcessPoolExecutor(count, get_context("fork"), end_with_parent, (os.getpid(),)) as pool:
            # all are forked at the first task, before tqdm or Arrow start a thread
            pool.submit(int).result()
            yield lambda chunks: in_order(pool, chunks, ahead=2 * count)
    except BrokenProcessPool as error:
        raise InputError("a process that tokenizes was ended from outside, most likely for want of memory; free some, then `dvc repro`") from error
    finally:
        gc.unfreeze()


def in_order(pool: Executor, chunks: Iterator, ahead: int) -> Iterator[Chunk]:
    """Results in the order of the chunks, of which at most `ahead` are under way: what is waiting stays small."""
    waiting: deque = deque()
    for chunk in chunks:
        waiting.append(pool.submit(prepare, chunk))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def start_worker(task: Task) -> None:
    """Load the tokenizer once a process."""
    global loaded
    tokenizer = load_tokenizer(task.base, task.template)
    loaded = (task, tokenizer, special_pattern(tokenizer))


def prepare(chunk: tuple[pa.RecordBatch, str]) -> Chunk:
    """Convert and tokenize some rows of one source."""
    task, tokenizer, special = loaded
    kind = KINDS[task.kind]
    batch, name = chunk
    count = batch.num_rows
    result = Chunk(
        reason=np.zeros(count, np.uint8),
        details={},
        tokens=np.zeros(count, np.int32),
        lengths=np.zeros((count, len(kind.columns)), np.int32),
        label_tokens=np.zeros(count, np.int32),
        digests=np.zeros(count, "V16"),
        signatures=np.zeros((count if task.signatures else 0, duplicates.PERMUTATIONS), np.uint32),
        data=b"",
    )
    found: dict[int, Any] = {}
    for index, row in enumerate(rows_of(batch)):
        try:
            item = kind.convert(row, name)
            if match := special.search("\n".join(kind.texts(item))):
                raise InvalidRow(f"a text holds {match[0]!r}, which would be read as the token that the template writes")
            found[index] = item
        except InvalidRow as error:
            result.reason[index] = ledger.NO_PREFERENCE if isinstance(error, NoPreference) else ledger.INVALID
            result.details[index] = str(error)
    pieces = []
    for (index, item), row in zip(found.items(), tokenized(kind, tokenizer, list(found.values())), strict=True):
        if isinstance(row, str):
            result.reason[index], result.details[index] = ledger.INVALID, row
            continue
        result.tokens[index] = sum(len(row[key]) for key in kind.columns if key != "labels")
        fitted = kind.fit(row, task.max_length, task.overlong)
        if isinstance(fitted, tuple):
            result.reason[index], result.details[index] = fitted
            continue
        text = duplicates.normalized(kind.texts(item))
        result.digests[index] = np.void(duplicates.digest(text))
        if task.signatures:
            result.signatures[index] = duplicates.signature(text)
        result.lengths[index] = [len(fitted[key]) for key in kind.columns]
        result.label_tokens[index] = kind.labels(fitted)
        pieces += [np.asarray(fitted[key], np.int32) for key in kind.columns]
    result.data = np.concatenate(pieces).tobytes() if pieces else b""
    return result


def tokenized(kind: Kind, tokenizer: PreTrainedTokenizerBase, items: list[Any]) -> list[Tokens | str]:
    """The tokens of each item, or why the template cannot render it; halving a batch finds the few of which that is true."""
    try:
        return list(kind.tokenize(tokenizer, items))
    except InvalidRow as error:
        if len(items) == 1:
            return [str(error)]
        half = len(items) // 2
        return tokenized(kind, tokenizer, items[:half]) + tokenized(kind, tokenizer, items[half:])
