"""Fetch the preference data at its pinned sources into `data/raw/preferences/<name>.parquet`, with the source's columns."""

import argparse
from pathlib import Path

from stages import command, params
from stages.tables import fetch_tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    fetch_tables(params.load().data.preferences.sources, arguments.out)


if __name__ == "__main__":
    command(main)
