"""What tokenize_sft and tokenize_dpo share: raw rows to shards of tokens, on all cores, in bounded memory.

Rows are converted and tokenized in chunks by worker processes; their tokens go to one file on disk, and only a few numbers a
row stay in memory, and a line for each row that leaves. Those decide which rows are kept, held out and trained on. The kept ones are then read back in shuffled
order, a window at a time, and each window becomes a shard. No number of processes and no hash seed changes a byte.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from stages import InputError, duplicates, ledger
from stages.params import PreferencesData, SftData, Tokenize
from stages.records import filling, parquet_file, write_json
from stages.selection import draw, generator, leave_contaminated, leave_duplicates
from stages.workers import CHUNK, KINDS, Chunk, Task, process_count, workers

WINDOW = 8_192
"""Kept rows that are in memory at once, and whole examples that are packed together."""
BATCH = 256
"""Rows of a shard's record batch, which a reader maps into memory one at a time."""

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
            with workers(task, processes or process_count(sum(len(source.numbers) for source in taken))) as work:
                rows, lengths, digests, signatures = read(taken, task, file, work)
            if data.exclude_contaminated:
                leave_contaminated(rows, paths.contamination, kind.data)
            leave_duplicates(rows, section, digests, signatures)
            del digests, signatures
            train, held_out = draw(rows, data, section, seed, f"tokenize.{name}")
            share = ledger.check_budget(rows, f"tokenize.{name}", section.max_dropped)
            offsets = np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))])
            account = ledger.account(rows)
            (total,) = account["total"]
            shards = [
                {"part": part} | write_shards(order, file, offsets, lengths, kind.columns, pack, shuffle, folder, part, section.max_length)
                for part, order, shuffle in (("train", train, generator(seed, "shards")), ("held_out", held_out, None))
            ]
        spool.unlink()
    ledger.write_dropped(rows, paths.dropped)
    counts = total["rows"]
    write_json(paths.metrics, account | {"rows": counts["train"], "dropped": share, "shards": shards})
    print(f"{counts['train']:,} rows to train on and {counts['held_out']:,} held out, of {counts['raw']:,}; {len(rows.details):,} left out: {paths.dropped}")


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
