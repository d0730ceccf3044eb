"""Which rows make up each global batch, in an order that does not depend on devices or accumulation."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.table import InMemoryTable

from reprotune.records import read_parquet


def batches(
    rows: datasets.Dataset, columns: Sequence[str], steps: int, size: int, seed: int
) -> datasets.Dataset:
    """The rows of `steps` global batches of `size`, one after another: epochs, each shuffled by itself.

    Within a batch the longest rows come first, so that a micro-batch holds rows of similar length.

    Args:
        columns: lists of tokens, whose lengths add up to a row's.
    """
    epochs = -(-steps * size // len(rows))
    order = np.concatenate(
        [np.random.default_rng((seed, epoch)).permutation(len(rows)) for epoch in range(epochs)]
    )
    order = order[: steps * size].reshape(steps, size)
    lengths = sum(pc.list_value_length(rows.data.column(column)).to_numpy() for column in columns)
    longest_first = np.argsort(-lengths[order], axis=1, kind="stable")
    return rows.select(np.take_along_axis(order, longest_first, axis=1).ravel(), keep_in_memory=True)


def table(path: Path) -> datasets.Dataset:
    """A Parquet file as a dataset in memory."""
    return datasets.Dataset(InMemoryTable(read_parquet(path)))
