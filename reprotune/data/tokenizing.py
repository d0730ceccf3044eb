"""The stages tokenize_sft and tokenize_dpo: raw rows to shards of tokens, on all cores, in bounded memory.

Tokens go to the spool while a few numbers a row stay in memory and decide which rows go from there to shards.
"""

import argparse
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from reprotune.data import accounting
from reprotune.data.accounting import Reason, Rows
from reprotune.data.chat_tokens import ChatTokens
from reprotune.data.chunks import Preparer, RowArrays
from reprotune.data.limiting import Taken, batches, take
from reprotune.data.row_kinds import EXAMPLES, PAIRS, Kind
from reprotune.data.selection import (
    draw,
    generator,
    group_by_prompt,
    leave_out_contaminated,
    leave_out_duplicates,
    shared_prompts,
)
from reprotune.data.shards import Pack, write_shards
from reprotune.data.spool import Spool
from reprotune.data.templates import load_tokenizer, special_pattern, template_file
from reprotune.data.workers import process_count, workers
from reprotune.errors import InputError
from reprotune.params import Params, PreferencesData, SftData, Tokenize
from reprotune.records import filling, write_metrics


def instructions(
    settings: Params, paths: argparse.Namespace, pack: Pack, processes: int | None = None
) -> None:
    """Tokenize instruction rows to {input_ids, labels, seq_lengths}, the lengths of a row's examples."""
    run(EXAMPLES, settings, settings.tokenize.sft, settings.data.sft, paths, pack, processes)


def preferences(settings: Params, paths: argparse.Namespace, processes: int | None = None) -> None:
    """Tokenize preference pairs to {prompt_ids, chosen_ids, rejected_ids}, as TRL's collator takes them."""
    run(PAIRS, settings, settings.tokenize.dpo, settings.data.preferences, paths, unchanged, processes)


def unchanged(pairs: pa.Table) -> pa.Table:
    """A pair is a row of a shard."""
    return pairs


def run(
    kind: Kind,
    settings: Params,
    section: Tokenize,
    data: SftData | PreferencesData,
    paths: argparse.Namespace,
    pack: Pack,
    processes: int | None,
) -> None:
    """Write the shards to `paths.out`, and the account of every row to `paths.dropped` and `paths.metrics`.

    Args:
        processes: None takes one a core, or fewer for few rows. No number of them changes a byte.
    """
    section_name = f"tokenize.{kind.name}"
    with filling(paths.out) as folder:
        file = folder / ".tokens"
        with file.open("w+b") as content:
            rows, arrays = tokenize_sources(
                take(data, settings.seed, paths.raw),
                preparer_of(kind, settings, section, paths),
                content,
                processes,
            )
            if section.overlong == "error":
                refuse_overlong(rows, section_name)
            if data.exclude_contaminated:
                leave_out_contaminated(rows, paths.contamination, kind.data)
            leave_out_duplicates(rows, section, arrays.digests, arrays.signatures)
            prompts = group_by_prompt(rows, section, arrays.prompt_digests, arrays.prompt_signatures)
            spool = Spool.of(content, kind.columns, arrays.lengths)
            # frees the digests and signatures, which are large
            del arrays
            train, held_out = draw(rows, prompts, data, section, settings.seed, section_name)
            share = accounting.check_budget(rows, section_name, section.max_dropped)
            account = accounting.account(rows)
            shuffle = generator(settings.seed, "shards")
            shards = [
                write_part(folder, "train", spool, train, pack, shuffle, kind, section.max_length),
                write_part(folder, "held_out", spool, held_out, pack, None, kind, section.max_length),
            ]
        file.unlink()
    accounting.write_dropped(rows, paths.dropped)
    counts = account["total"][0]["rows"]
    details = account | {"prompts": shared_prompts(rows, prompts), "dropped": share, "shards": shards}
    write_metrics(paths.metrics, {"rows": counts["train"]}, details)
    print(
        f"{counts['train']:,} rows to train on and {counts['held_out']:,} held out, of {counts['raw']:,}; "
        f"{len(rows.details):,} left out: {paths.dropped}"
    )


def preparer_of(kind: Kind, settings: Params, section: Tokenize, paths: argparse.Namespace) -> Preparer:
    tokenizer = load_tokenizer(paths.base, template_file(paths.templates, paths.base, settings.model))
    return Preparer(
        kind=kind,
        chat=ChatTokens(tokenizer),
        special=special_pattern(tokenizer),
        max_length=section.max_length,
        overlong=section.overlong,
        signatures=section.deduplicate.near is not None,
    )


def tokenize_sources(
    taken: list[Taken], preparer: Preparer, spool: BinaryIO, processes: int | None
) -> tuple[Rows, RowArrays]:
    """Tokenize all sources into the file `spool`; returns the rows, and what is known of each."""
    count = sum(len(source.numbers) for source in taken)
    arrays = RowArrays.zeros(count, preparer.kind, preparer.signatures)
    details: dict[int, str] = {}
    done = 0
    with (
        workers(preparer, processes or process_count(count)) as work,
        tqdm(total=count, desc="tokenizing", unit="row") as progress,
    ):
        for chunk in work(
            (batch, source.format, source.ignore) for source in taken for batch in batches(source)
        ):
            spool.write(chunk.tokens)
            arrays.put(done, chunk.rows)
            details |= {done + index: detail for index, detail in chunk.details.items()}
            size = len(chunk.rows.reason)
            done += size
            progress.update(size)
    spool.flush()
    return as_rows(taken, preparer.kind, arrays, details), arrays


def as_rows(taken: list[Taken], kind: Kind, arrays: RowArrays, details: dict[int, str]) -> Rows:
    token_columns = [kind.columns.index(column) for column in kind.token_columns]
    sizes = [len(source.numbers) for source in taken]
    return Rows(
        names=[source.name for source in taken],
        files=[source.file for source in taken],
        raw=[source.raw for source in taken],
        source=np.repeat(np.arange(len(taken), dtype=np.int16), sizes),
        number=np.concatenate([source.numbers for source in taken]),
        reason=arrays.reason,
        details=details,
        tokens=arrays.tokens,
        kept_tokens=arrays.lengths[:, token_columns].sum(axis=1, dtype=np.int32),
        label_tokens=arrays.label_tokens,
        seen=np.zeros(sum(sizes), np.int32),
    )


def refuse_overlong(rows: Rows, section_name: str) -> None:
    overlong = np.flatnonzero(rows.reason == Reason.OVERLONG)
    if len(overlong):
        first = int(overlong[0])
        raise InputError(
            f"{rows.where(first)}: {rows.details[first]}, and {section_name}.overlong is error; "
            f"raise {section_name}.max_length, or drop or truncate such rows"
        )


def write_part(
    folder: Path,
    part: str,
    spool: Spool,
    order: np.ndarray,
    pack: Pack,
    shuffle: np.random.Generator | None,
    kind: Kind,
    max_length: int,
) -> dict[str, Any]:
    """Write the shards of `part`; returns how much they hold, and how full their rows are."""
    written = write_shards(folder, part, spool, order, pack, shuffle, kind.token_columns)
    fill = {"filled": written["tokens"] / (written["rows"] * max_length)} if kind.measures_fill else {}
    return {"part": part} | written | fill
