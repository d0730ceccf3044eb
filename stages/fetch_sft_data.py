"""Fetch the instruction data at its pinned sources into `data/raw/sft/<name>.parquet`, with the source's own columns."""

import argparse
from pathlib import Path

from stages import command, params
from stages.tables import fetch_tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    fetch_tables(params.load().data.sft.sources, arguments.out)


if __name__ == "__main__":
    command(main)
