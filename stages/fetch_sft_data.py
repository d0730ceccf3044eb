"""Fetch one source of instruction rows to `data/raw/sft/<source>.parquet`, columns unchanged."""

from reprotune import params_file, process
from reprotune.data import tables
from reprotune.pipeline.guard import stage


def main() -> None:
    found = process.arguments(__doc__, "out", of="source")
    source = params_file.load().data.sft.sources[found.source].source
    tables.run(found.source, source, found.out)


if __name__ == "__main__":
    stage(main)
