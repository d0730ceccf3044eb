"""What tokenize_sft and tokenize_dpo share: raw rows to shards of tokens, on all cores, in bounded memory.

Rows are converted and tokenized in chunks by worker processes; their tokens go to one file on disk, and only a few numbers a
row stay in memory, and a line for each row that leaves. Those decide which rows are kept, held out and trained on. The kept ones are then read back in shuffled
order, a window at a time, and each window becomes a shard. No number of processes and no hash seed changes a byte.
"""

import argparse
import gc
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from stages import InputError, duplicates, end_with_parent, ledger
from stages.chat import IGNORED, load_tokenizer, special_pattern, tokenize, tokenize_pairs
from stages.formats import InvalidRow, NoPreference, conversation_texts, pair_texts, rows_of, to_conversation, to_pair
from stages.params import PreferencesData, SftData, Tokenize
from stages.records import filling, parquet_file, read_parquet, write_json

CHUNK = 500
"""Rows that a worker takes at once."""
WINDOW = 8_192
"""Kept rows that are in memory at once, and whole examples that are packed together."""
BATCH = 256
"""Rows of a shard's record batch, which a reader maps into memory one at a time."""

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

Pack = Callable[[pa.Table], pa.Table]


def run(
    name: str, section: Tokenize, data: SftData | PreferencesData, seed: int, template: Path, paths: argparse.Namespace, pack: Pack, processes: int | None
) -> None:
    """Tokenize the sources of `data`: shards under `paths.out`, the account of every row in `paths.dropped` and `paths.metrics`.

    Args:
        name: a key of KINDS.
        pack: makes of a table of kept rows, a list column for each of the kind's columns, the rows of a shard.
        processes: None takes as many as cores, or fewer for few rows; the output is the same.
    """
    kind = KINDS[name]
    task = Task(name, paths.base, template, section.max_length, section.overlong, section.deduplicate.near is not None)
    with filling(paths.out) as folder:
        spool = folder / ".tokens"
        taken = take(data, seed, paths.raw)
        with spool.open("w+b") as file:
            with workers(task, processes or process_count(taken)) as work:
                rows, lengths, digests, signatures = read(taken, task, file, work)
            if data.exclude_contaminated:
                leave_contaminated(rows, paths.contamination, kind.data)
            leave_duplicates(rows, section, digests, signatures)
            del digests, signatures
            train, held_out = draw(rows, data, section, seed, f"tokenize.{name}")
            share = ledger.check_budget(rows, f"tokenize.{name}", section.max_dropped)
            offsets = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
            record = ledger.account(rows) | {"share_dropped": share}
            record["shards"] = {
                part: write_shards(order, file, offsets, lengths, kind.columns, pack, shuffle, folder, part, section.max_length)
                for part, order, shuffle in (("train", train, generator(seed, "shards")), ("held_out", held_out, None))
            }
        spool.unlink()
    ledger.write_dropped(rows, paths.dropped)
    write_json(paths.metrics, record)
    total = record["total"]["rows"]
    print(f"{total['train']:,} rows to train on and {total['held_out']:,} held out, of {total['raw']:,}; {len(rows.details):,} left out: {paths.dropped}")


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose, so that drawing more or fewer for it changes no other draw."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


@dataclass(frozen=True)
class Taken:
    """A source's raw table, and the numbers of the rows that are taken from it, in order."""

    name: str
    format: str
    file: Path
    raw: int
    numbers: np.ndarray


def take(data: SftData | PreferencesData, seed: int, raw: Path) -> list[Taken]:
    found = []
    for name in sorted(data.sources):
        file = raw / f"{name}.parquet"
        with parquet_file(file) as table:
            count = table.metadata.num_rows
        limit = data.mix[name].limit
        numbers = np.arange(count, dtype=np.int32)
        if limit is not None and limit < count:
            numbers = np.sort(generator(seed, f"limit {name}").permutation(count)[:limit]).astype(np.int32)
        found.append(Taken(name, data.sources[name].format, file, count, numbers))
    return found


def process_count(taken: list[Taken]) -> int:
    """One a core, as far as each has enough to do to be worth its start."""
    return min(len(os.sched_getaffinity(0)), 1 + sum(len(source.numbers) for source in taken) // (4 * CHUNK))


@contextmanager
def workers(task: Task, count: int) -> Iterator[Callable[[Iterator], Iterator[Chunk]]]:
    """Yield a function that maps `prepare` over chunks in order: here if there is one process, otherwise in a pool."""
    start_worker(task)
    if count == 1:
        yield lambda chunks: map(prepare, chunks)
        return
    # forked, a worker is ready at once and shares what is loaded, which the garbage collector must not touch
    gc.freeze()
    with ProcessPoolExecutor(count, get_context("fork"), end_with_parent) as pool:
        # all are forked at the first task, before tqdm or Arrow start a thread
        pool.submit(int).result()
        try:
            yield lambda chunks: in_order(pool, chunks, ahead=2 * count)
        except BrokenProcessPool as error:
            raise InputError("a process that tokenizes was ended from outside, most likely for want of memory; free some, then `dvc repro`") from error
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
    global worker
    tokenizer = load_tokenizer(task.base, task.template)
    worker = (task, tokenizer, special_pattern(tokenizer))


def prepare(chunk: tuple[pa.RecordBatch, str]) -> Chunk:
    """Convert and tokenize some rows of one source."""
    task, tokenizer, special = worker
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
    for (index, item), row in zip(found.items(), kind.tokenize(tokenizer, list(found.values())), strict=True):
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


def read(
    taken: list[Taken], task: Task, spool: BinaryIO, work: Callable[[Iterator], Iterator[Chunk]]
) -> tuple[ledger.Rows, np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize all sources into `spool`; returns the rows, and for each the lengths of its parts, its digest and signature."""
    sizes = [len(source.numbers) for source in taken]
    count, parts = sum(sizes), len(KINDS[task.kind].columns)
    found = {
        "reason": np.zeros(count, np.uint8),
        "tokens": np.zeros(count, np.int32),
        "lengths": np.zeros((count, parts), np.int32),
        "label_tokens": np.zeros(count, np.int32),
        "digests": np.zeros(count, "V16"),
        "signatures": np.zeros((count if task.signatures else 0, duplicates.PERMUTATIONS), np.uint32),
    }
    details: dict[int, str] = {}
    batches = ((batch, source.format) for source in taken for batch in taken_batches(source))
    done = 0
    with tqdm(total=count, desc="tokenizing", unit="row") as progress:
        for chunk in work(batches):
            spool.write(chunk.data)
            for name, values in found.items():
                own = getattr(chunk, name)
                values[done : done + len(own)] = own
            details |= {done + index: detail for index, detail in chunk.details.items()}
            done += len(chunk.reason)
            progress.update(len(chunk.reason))
    spool.flush()
    lengths = found["lengths"]
    rows = ledger.Rows(
        names=[source.name for source in taken],
        files=[source.file for source in taken],
        raw=[source.raw for source in taken],
        source=np.repeat(np.arange(len(taken), dtype=np.int16), sizes),
        number=np.concatenate([source.numbers for source in taken]),
        reason=found["reason"],
        details=details,
        tokens=found["tokens"],
        kept_tokens=lengths.sum(axis=1, dtype=np.int32) if task.kind == "dpo" else lengths[:, 0].copy(),
        label_tokens=found["label_tokens"],
        seen=np.zeros(count, np.int32),
    )
    if task.overlong == "error" and (rows.reason == ledger.OVERLONG).any():
        index = int(np.flatnonzero(rows.reason == ledger.OVERLONG)[0])
        raise InputError(
            f"{rows.where(index)}: {rows.details[index]}, and tokenize.{task.kind}.overlong is error; "
            f"raise tokenize.{task.kind}.max_length, or drop or truncate such rows"
        )
    return rows, lengths, found["digests"], found["signatures"]


def taken_batches(source: Taken) -> Iterator[pa.RecordBatch]:
    """The taken rows of a raw table, CHUNK at a time; one row group is in memory."""
    with parquet_file(source.file) as table:
        start = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            inside = source.numbers[np.searchsorted(source.numbers, start) : np.searchsorted(source.numbers, start + count)] - start
            if len(inside):
                rows = table.read_row_group(group, use_threads=False).take(inside)
                for batch in rows.combine_chunks().to_batches(max_chunksize=CHUNK):
                    # a slice would travel to the worker with all the rows around it
                    yield batch.take(pa.array(range(batch.num_rows)))
            start += count


def leave_contaminated(rows: ledger.Rows, folder: Path, data: str) -> None:
    found: dict[tuple[str, int], str] = {}
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(f"{folder}: no *.parquet, expected a file for each benchmark; `dvc repro contamination` makes them")
    for file in files:
        for match in read_parquet(file).to_pylist():
            if match["data"] == data:
                found.setdefault((match["source"], match["row"]), f"holds row {match['doc_id']} of {file.stem}")
    details = {
        index: found[key]
        for index in map(int, np.flatnonzero(rows.reason == ledger.KEPT))
        if (key := (rows.names[rows.source[index]], int(rows.number[index]))) in found
    }
    rows.leave(np.array(list(details), np.int64), ledger.CONTAMINATED, details)


def leave_duplicates(rows: ledger.Rows, section: Tokenize, digests: np.ndarray, signatures: np.ndarray) -> None:
    searches = []
    if section.deduplicate.exact:
        searches.append((ledger.DUPLICATE, lambda kept: duplicates.exact(digests[kept]), "the text of"))
    if (threshold := section.deduplicate.near) is not None:
        searches.append((ledger.NEAR_DUPLICATE, lambda kept: duplicates.near(signatures[kept], threshold), "nearly the text of"))
    for reason, search, words in searches:
        kept = np.flatnonzero(rows.reason == ledger.KEPT)
        first = kept[search(kept)]
        again = first != kept
        details = {int(index): f"{words} {rows.where(other)}" for index, other in zip(kept[again], first[again], strict=True)}
        rows.leave(kept[again], reason, details)


def draw(rows: ledger.Rows, data: SftData | PreferencesData, section: Tokenize, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decide what each kept row is for: indices to train on, shuffled, as often as they are seen, and held-out ones in order."""
    kept = np.flatnonzero(rows.reason == ledger.KEPT)
    if section.held_out >= len(kept):
        ledger.check_budget(rows, name, section.max_dropped)
        raise InputError(
            f"{name}.held_out: {len(kept)} of {len(rows.reason)} rows are kept, expected more than the {section.held_out} to hold out; "
            "lower held_out, or raise `limit` in data or max_length"
        )
    held_out = np.sort(generator(seed, "held out").permutation(kept)[: section.held_out])
    train = np.setdiff1d(kept, held_out)
    for index, source in enumerate(rows.names):
        weight = data.mix[source].weight
        own = train[rows.source[train] == index]
        rows.seen[own] = int(weight)
        rows.seen[generator(seed, f"weight {source}").permutation(own)[: round((weight - int(weight)) * len(own))]] += 1
    unseen = train[rows.seen[train] == 0]
    rows.leave(unseen, ledger.NOT_DRAWN, {int(index): f"the weight of {rows.names[rows.source[index]]} is below 1" for index in unseen})
    order = generator(seed, "order").permutation(np.repeat(train, rows.seen[train]))
    if len(order) == 0:
        raise InputError(f"{name}: no row is left to train on; raise the weights in data, or `limit`")
    for counts in (rows.kept_tokens, rows.label_tokens):
        counts[rows.reason != ledger.KEPT] = 0
    return order, held_out


def write_shards(
    order: np.ndarray, spool: BinaryIO, offsets: np.ndarray, lengths: np.ndarray, columns: tuple[str, ...], pack: Pack,
    shuffle: np.random.Generator | None, folder: Path, name: str, max_length: int,
) -> dict[str, float]:  # fmt: skip
    """Write the rows in `order` as Arrow stream files `<name>-<number>.arrow`, one a window; returns how many they hold, and how full they are."""
    count = tokens = 0
    windows = range(0, len(order), WINDOW)
    for number, start in enumerate(tqdm(windows, desc=f"writing {name}", unit="shard", disable=len(windows) < 2)):
        table = pack(window(order[start : start + WINDOW], spool, offsets, lengths, columns))
        if shuffle is not None:
            table = table.take(shuffle.permutation(table.num_rows))
        with pa.OSFile(str(folder / f"{name}-{number:05d}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=BATCH)
        count += table.num_rows
        tokens += sum(len(table[column].combine_chunks().values) for column in columns if column != "labels")
    return {"rows": count, "tokens": tokens} | ({"filled": tokens / (count * max_length)} if "labels" in columns else {})


def window(order: np.ndarray, spool: BinaryIO, offsets: np.ndarray, lengths: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Read rows back, a list column for each of `columns`; in the order of the file, which is faster than in theirs."""
    sizes = lengths[order]
    starts = [np.concatenate([[0], np.cumsum(sizes[:, part])]).astype(np.int32) for part in range(len(columns))]
    values = [np.empty(ends[-1], np.int32) for ends in starts]
    for place in np.argsort(offsets[order], kind="stable"):
        begin = 4 * int(offsets[order[place]])
        row = np.frombuffer(os.pread(spool.fileno(), 4 * int(sizes[place].sum()), begin), np.int32)
        done = 0
        for part, size in enumerate(sizes[place]):
            values[part][starts[part][place] : starts[part][place + 1]] = row[done : done + size]
            done += size
    return pa.Table.from_arrays([pa.ListArray.from_arrays(*column) for column in zip(starts, values, strict=True)], names=list(columns))
