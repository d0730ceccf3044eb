"""Tokenizing instruction data: every row accounted for, nothing trained on but answers, nothing lost by packing."""

import pytest

from stages import InputError, params
from stages.chat import IGNORED, SFT_FORMATS, load_tokenizer, tokenize
from stages.records import read_parquet
from stages.sources import fetched, read_rows
from tests import steps
from tests.conftest import changed
from tests.tiny import ROOT, alpaca_rows


def examples(file) -> list[tuple[list[int], list[int]]]:
    """Each packed example's ids and labels."""
    found = []
    for row in read_parquet(file).to_pylist():
        start = 0
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_is_whole_and_there_once(packing, settings, model, tokenizer, tmp_path):
    settings = changed(settings, {"tokenize.sft.packing": packing, "tokenize.sft.limit": None})
    rows = alpaca_rows()
    ledger = steps.tokenize_sft(settings, model, rows, tmp_path)
    found = examples(tmp_path / "sft_tokens" / "train.parquet") + examples(tmp_path / "sft_tokens" / "held_out.parquet")
    expected = [tokenize(tokenizer, SFT_FORMATS["alpaca"](row)) for row in rows]
    assert sorted(found) == sorted(expected)
    assert ledger["tokens_kept"] == sum(len(ids) for ids, _ in expected)
    assert ledger["tokens_with_labels"] == sum(label != IGNORED for _, labels in expected for label in labels)
    lengths = [len(row["input_ids"]) for row in read_parquet(tmp_path / "sft_tokens" / "train.parquet").to_pylist()]
    assert max(lengths) <= 128 and (len(lengths) < 34) is packing


def test_the_ledger_counts_every_row(settings, model, tmp_path):
    long = {"instruction": "say it", "input": "", "output": "red cat " * 100}
    empty = {"instruction": "say nothing", "input": "", "output": " "}
    rows = [*alpaca_rows(), *alpaca_rows()[:5], long, empty]
    settings = changed(settings, {"tokenize.sft.max_dropped": 0.05})
    ledger = steps.tokenize_sft(settings, model, rows, tmp_path)
    reasons = {key: ledger[f"rows_{key}"] for key in ("raw", "empty", "duplicate", "overlong", "over_limit", "train", "held_out")}
    assert reasons == {"raw": 47, "empty": 1, "duplicate": 5, "overlong": 1, "over_limit": 4, "train": 30, "held_out": 6}


def test_too_many_dropped_rows_fail_the_stage(settings, model, tmp_path):
    settings = changed(settings, {"tokenize.sft.max_length": 30, "tokenize.sft.limit": 8})
    with pytest.raises(InputError, match=r"tokenize\.sft\.max_dropped: \d+ of 40 rows .* expected at most 5\.0%; raise max_length"):
        steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    assert not (tmp_path / "sft_data.json").exists()


def test_too_few_rows_fail_the_stage(settings, model, tmp_path):
    with pytest.raises(InputError, match=r"tokenize\.sft: 10 rows are left to draw from, expected at least limit \(36\)"):
        steps.tokenize_sft(settings, model, alpaca_rows(10), tmp_path)


def test_the_draw_follows_the_seed_alone(settings, model, tmp_path):
    def tokens(name, seed):
        steps.tokenize_sft(changed(settings, {"seed": seed}), model, alpaca_rows(), tmp_path / name)
        return (tmp_path / name / "sft_tokens" / "train.parquet").read_bytes()

    assert tokens("a", 1) == tokens("b", 1) != tokens("c", 2)


def test_labels_of_real_rows_are_the_answers(model):
    """All 999 rows of the package: decode what is trained on and compare with the answer and the end-of-turn token."""
    tokenizer = load_tokenizer(model, ROOT / "templates" / "chatml.jinja")
    with fetched(params.load(ROOT / "params.yaml").data.sft[0].source) as path:
        rows = read_rows(path)
    for row in rows:
        ids, labels = tokenize(tokenizer, SFT_FORMATS["alpaca"](row))
        trained = [label for label in labels if label != IGNORED]
        assert tokenizer.decode(trained, clean_up_tokenization_spaces=False) == row["output"] + "<|im_end|>"
        start = len(ids) - len(trained)
        assert labels == [IGNORED] * start + ids[start:] and tokenizer.pad_token_id not in ids
