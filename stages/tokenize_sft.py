"""Tokenize the instruction data into shards under `data/tokenized/sft`: rows to train on, and held-out ones to measure on.

Each row has input_ids, labels and seq_lengths (the lengths of the whole examples in it, which attention and positions
keep apart). Every raw row is accounted for in `metrics/data/sft.json`, and those left out are in `data/dropped/sft.parquet`.
"""

import argparse
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable
from trl import pack_dataset

from stages import command, params, tokenizing


def run(settings: params.Params, paths: argparse.Namespace, processes: int | None = None) -> None:
    section, template = settings.tokenize.sft, paths.templates / f"{settings.model.chat_template}.jinja"
    pack = partial(packed, max_length=section.max_length) if section.packing else unpacked
    tokenizing.run("sft", section, settings.data.sft, settings.seed, template, paths, pack, processes)


def packed(rows: pa.Table, max_length: int) -> pa.Table:
    """Whole examples put into rows of at most max_length tokens, best fit first (https://arxiv.org/abs/2404.10830)."""
    datasets.disable_progress_bars()
    dataset = pack_dataset(datasets.Dataset(InMemoryTable(rows)), max_length, strategy="bfd", map_kwargs={"batch_size": None})
    return pa.table({name: list_column(dataset.data.column(name)) for name in ("input_ids", "labels", "seq_lengths")})


def unpacked(rows: pa.Table) -> pa.Table:
    lengths = rows["input_ids"].combine_chunks().value_lengths()
    return rows.append_column("seq_lengths", pa.ListArray.from_arrays(pa.array(range(len(rows) + 1), pa.int32()), lengths))


def list_column(column: pa.ChunkedArray) -> pa.ListArray:
    return column.cast(pa.list_(pa.int32())).combine_chunks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("raw", "base", "templates", "contamination", "out", "dropped", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    run(params.load(), parser.parse_args())


if __name__ == "__main__":
    command(main)
