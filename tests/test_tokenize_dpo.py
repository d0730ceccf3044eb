"""Tokenizing preference pairs."""

import pytest

from stages import InputError
from stages.records import read_parquet
from tests import steps
from tests.conftest import changed
from tests.tiny import preference_rows


def test_pairs_keep_prompt_and_answers(settings, model, tokenizer, tmp_path):
    settings = changed(settings, {"tokenize.dpo.limit": None})
    ledger = steps.tokenize_dpo(settings, model, preference_rows(), tmp_path)
    rows = [row for part in ("train", "held_out") for row in read_parquet(tmp_path / "dpo_tokens" / f"{part}.parquet").to_pylist()]
    found = {tuple(tokenizer.decode(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in rows}
    assert found == {
        (
            f"<|im_start|>user\n{row['conversations'][0]['value']}<|im_end|>\n<|im_start|>assistant\n",
            row["chosen"]["value"] + "<|im_end|>",
            row["rejected"]["value"] + "<|im_end|>",
        )
        for row in preference_rows()
    }
    assert (ledger["rows_raw"], ledger["rows_train"], ledger["rows_held_out"]) == (24, 20, 4)


def test_a_long_answer_drops_the_pair(settings, model, tmp_path):
    rows = preference_rows()
    rows[3]["rejected"]["value"] = "dog " * 200
    with pytest.raises(InputError, match=r"tokenize\.dpo\.max_dropped: 1 of 24 rows \(4\.2%\)"):
        steps.tokenize_dpo(settings, model, rows, tmp_path)
    assert steps.tokenize_dpo(changed(settings, {"tokenize.dpo.max_dropped": 0.05}), model, rows, tmp_path)["rows_overlong"] == 1


def test_a_row_with_an_unknown_role_is_named(settings, model, tmp_path):
    rows = preference_rows()
    rows[2]["chosen"]["from"] = "robot"
    with pytest.raises(InputError, match=r"pairs\.parquet, row 2: `from` is 'robot', expected one of"):
        steps.tokenize_dpo(settings, model, rows, tmp_path)
