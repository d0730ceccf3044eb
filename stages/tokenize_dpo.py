"""Tokenize the preference pairs into `data/tokenized/dpo`: pairs to train on, and held-out pairs to measure on.

Each row has prompt_ids, chosen_ids and rejected_ids, as TRL's DPO collator takes them. Every raw row is accounted for
in `metrics/data/dpo.json`.
"""

import argparse
from pathlib import Path

from stages import command, params
from stages.chat import PREFERENCE_FORMATS, conversations, load_tokenizer, tokenize_pair
from stages.records import filling, read_parquet, write_json, write_parquet
from stages.ledger import Ledger, split


def run(settings: params.Params, raw: Path, base: Path, templates: Path, out: Path, metrics: Path) -> None:
    tokenizer = load_tokenizer(base, templates / f"{settings.model.chat_template}.jinja")
    section = settings.tokenize.dpo
    ledger, rows = Ledger("tokenize.dpo"), []
    for source in settings.data.preferences:
        file = raw / f"{source.name}.parquet"
        for pair in conversations(read_parquet(file).to_pylist(), PREFERENCE_FORMATS[source.format], file):
            if pair is None:
                ledger.drop_empty()
                continue
            row = tokenize_pair(tokenizer, *pair)
            length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            if ledger.takes(repr(pair), length, section.max_length):
                rows.append(row)
    train, held_out = split(rows, section, settings.seed, ledger)
    for key in ("prompt", "chosen", "rejected"):
        ledger.record[f"tokens_{key}"] = sum(len(row[f"{key}_ids"]) for row in train + held_out)
    record = ledger.finished(section.max_dropped)
    with filling(out) as folder:
        write_parquet(folder / "train.parquet", train)
        write_parquet(folder / "held_out.parquet", held_out)
    write_json(metrics, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("raw", "base", "templates", "out", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    run(params.load(), arguments.raw, arguments.base, arguments.templates, arguments.out, arguments.metrics)


if __name__ == "__main__":
    command(main)
