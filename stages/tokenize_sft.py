"""Tokenize the instruction data into `data/tokenized/sft`: packed rows to train on, and held-out rows to measure on.

Each row has input_ids, labels and seq_lengths (the lengths of the whole examples in it, which attention and positions
keep apart). Every raw row is accounted for in `metrics/data/sft.json`.
"""

import argparse
from pathlib import Path

import datasets
from trl import pack_dataset

from stages import command, params
from stages.chat import IGNORED, SFT_FORMATS, conversations, load_tokenizer, tokenize
from stages.records import filling, read_parquet, write_json, write_parquet
from stages.ledger import Ledger, split


def run(settings: params.Params, raw: Path, base: Path, templates: Path, out: Path, metrics: Path) -> None:
    tokenizer = load_tokenizer(base, templates / f"{settings.model.chat_template}.jinja")
    section = settings.tokenize.sft
    ledger, rows = Ledger("tokenize.sft"), []
    for source in settings.data.sft:
        file = raw / f"{source.name}.parquet"
        for conversation in conversations(read_parquet(file).to_pylist(), SFT_FORMATS[source.format], file):
            if conversation is None:
                ledger.drop_empty()
                continue
            ids, labels = tokenize(tokenizer, conversation)
            if ledger.takes(repr(conversation), len(ids), section.max_length):
                rows.append({"input_ids": ids, "labels": labels})
    train, held_out = split(rows, section, settings.seed, ledger)
    ledger.record["tokens_kept"] = sum(len(row["input_ids"]) for row in train + held_out)
    ledger.record["tokens_with_labels"] = sum(label != IGNORED for row in train + held_out for label in row["labels"])
    record = ledger.finished(section.max_dropped)
    with filling(out) as folder:
        write(packed(train, section), folder / "train.parquet")
        write(packed(held_out, section), folder / "held_out.parquet")
    write_json(metrics, record)


def packed(rows: list[dict], section: params.TokenizeSft) -> datasets.Dataset:
    """Whole examples put into rows of at most max_length tokens, best fit first (https://arxiv.org/abs/2404.10830)."""
    dataset = datasets.Dataset.from_list(rows)
    if section.packing:
        return pack_dataset(dataset, section.max_length, strategy="bfd")
    return dataset.add_column("seq_lengths", [[len(row["input_ids"])] for row in rows])


def write(dataset: datasets.Dataset, path: Path) -> None:
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"], "seq_lengths": row["seq_lengths"]} for row in dataset]
    write_parquet(path, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("raw", "base", "templates", "out", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    run(params.load(), arguments.raw, arguments.base, arguments.templates, arguments.out, arguments.metrics)


if __name__ == "__main__":
    command(main)
