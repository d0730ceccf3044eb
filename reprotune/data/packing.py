"""Rows of several whole examples, filled up to a maximum length."""

from functools import partial

import pyarrow as pa

from reprotune.data.shards import Pack
from reprotune.data.spool import TOKEN
from reprotune.params import TokenizeSft

SEGMENTS = "seq_lengths"
"""Column of the lengths of a row's examples, by TRL's name."""


def packer(section: TokenizeSft) -> Pack:
    """What makes the rows of a shard from a table of examples."""
    return partial(packed, max_length=section.max_length) if section.packing else unpacked


def packed(examples: pa.Table, max_length: int) -> pa.Table:
    """Whole examples in rows of at most max_length tokens, best fit first (https://arxiv.org/abs/2404.10830)."""
    # four seconds, which rows that are not packed need not wait
    import datasets
    from datasets.table import InMemoryTable
    from trl import pack_dataset

    datasets.disable_progress_bars()
    dataset = pack_dataset(
        datasets.Dataset(InMemoryTable(examples)),
        max_length,
        strategy="bfd",
        map_kwargs={"batch_size": None},
    )
    lists = pa.list_(pa.from_numpy_dtype(TOKEN))
    columns = ("input_ids", "labels", SEGMENTS)
    return pa.table({name: dataset.data.column(name).cast(lists).combine_chunks() for name in columns})


def unpacked(examples: pa.Table) -> pa.Table:
    """Each example in a row of its own."""
    lengths = examples["input_ids"].combine_chunks().value_lengths()
    starts = pa.array(range(len(examples) + 1), pa.int32())
    return examples.append_column(SEGMENTS, pa.ListArray.from_arrays(starts, lengths))
