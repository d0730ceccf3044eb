"""Tokenize the preference pairs into shards under `data/tokenized/dpo`: pairs to train on, and held-out ones to measure on.

Each row has prompt_ids, chosen_ids and rejected_ids, as TRL's DPO collator takes them. Every raw row is accounted for in
`metrics/data/dpo.json`, and those left out are in `data/dropped/dpo.parquet`.
"""

import argparse
from pathlib import Path

import pyarrow as pa

from stages import command, params, tokenizing


def run(settings: params.Params, paths: argparse.Namespace, processes: int | None = None) -> None:
    section, template = settings.tokenize.dpo, paths.templates / f"{settings.model.chat_template}.jinja"
    tokenizing.run("dpo", section, settings.data.preferences, settings.seed, template, paths, whole, processes)


def whole(rows: pa.Table) -> pa.Table:
    """Pairs are not packed: a pair is a row."""
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("raw", "base", "templates", "contamination", "out", "dropped", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    run(params.load(), parser.parse_args())


if __name__ == "__main__":
    command(main)
