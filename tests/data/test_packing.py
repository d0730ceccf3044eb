"""Packing: whole examples fill the rows, over several shards."""

import random

import datasets

from tests import steps
from tests.conftest import changed


def test_rows_fill_when_packed(settings, model, tmp_path):
    """Alpaca-like lengths at 2048: at least 0.99 of a row's slots hold a token."""
    rng = random.Random(0)
    rows = [
        {
            "instruction": f"say {n}",
            "input": "",
            "output": " ".join(rng.choices(["cat", "dog"], k=1 + int(rng.expovariate(1 / 60)))),
        }
        for n in range(9_000)
    ]
    settings = changed(settings, {"tokenize.sft.max_length": 2048, "tokenize.sft.max_dropped": 0.0})
    account = steps.tokenize_sft(settings, model, rows, tmp_path)
    files = sorted(file.name for file in (tmp_path / "sft_tokens").iterdir())
    assert files == ["held_out-00000.arrow", "train-00000.arrow", "train-00001.arrow"]
    assert account["shards"]["train"]["filled"] >= 0.99
    shard = datasets.Dataset.from_file(str(tmp_path / "sft_tokens" / "train-00000.arrow"))
    first_lengths = [row["seq_lengths"][0] for row in shard]
    assert first_lengths != sorted(first_lengths, reverse=True), "packing puts the longest first, shuffle not"
