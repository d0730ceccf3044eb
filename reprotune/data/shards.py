"""Shards of training rows: Arrow stream files `<part>-<number>.arrow`, written a window of rows each."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from reprotune.data.spool import Spool
from reprotune.errors import InputError, first_line

WINDOW = 8_192
"""Kept rows in memory at once; packing fills rows with examples of one window."""
BATCH = 256
"""Rows of a record batch, the unit that a reader maps into memory."""

Pack = Callable[[pa.Table], pa.Table]
"""From a table of kept rows to the rows of a shard."""


def write_shards(
    folder: Path,
    part: str,
    spool: Spool,
    order: np.ndarray,
    pack: Pack,
    shuffle: np.random.Generator | None,
    token_columns: tuple[str, ...],
) -> dict[str, int]:
    """Write the rows of these indices as shards of `part`; returns how many rows and tokens the shards have.

    Args:
        shuffle: draws the order of the rows in each shard; None keeps it as packed.
    """
    rows = tokens = 0
    windows = range(0, len(order), WINDOW)
    for number, start in enumerate(
        tqdm(windows, desc=f"writing {part}", unit="shard", disable=len(windows) < 2)
    ):
        table = pack(spool.table(order[start : start + WINDOW]))
        if shuffle is not None:
            table = table.take(shuffle.permutation(table.num_rows))
        with (
            pa.OSFile(str(folder / f"{part}-{number:05d}.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table.combine_chunks(), max_chunksize=BATCH)
        rows += table.num_rows
        tokens += sum(len(table[column].combine_chunks().values) for column in token_columns)
    return {"rows": rows, "tokens": tokens}


def read_shards(folder: Path, part: str) -> datasets.Dataset:
    """The rows of all shards of `part`, mapped into memory; no copy is left in a cache folder.

    Raises:
        InputError: there is no shard, or one is damaged.
    """
    files = sorted(folder.glob(f"{part}-*.arrow"))
    if not files:
        raise InputError(
            f"{folder}: no shard {part}-*.arrow; `dvc checkout {folder}` restores it, "
            "`dvc repro` makes it anew"
        )
    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{folder}: a shard of {part} is damaged ({first_line(error)}); "
            f"`dvc checkout {folder}` restores it"
        ) from error
