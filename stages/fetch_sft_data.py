"""Fetch the instruction rows from their pinned sources to `data/raw/sft`, columns unchanged."""

from reprotune import params_file, process
from reprotune.data.tables import fetch_tables
from reprotune.pipeline.guard import stage


def main() -> None:
    paths = process.paths(__doc__, "out")
    fetch_tables(params_file.load().data.sft.sources, paths.out)


if __name__ == "__main__":
    stage(main)
