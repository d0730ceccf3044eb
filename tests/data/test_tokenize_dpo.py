"""Tokenizing preference pairs."""

import json

import pytest

from reprotune.data.chat_tokens import ChatTokens
from reprotune.data.formats import to_pair
from reprotune.data.shards import read_shards
from reprotune.errors import InputError
from tests import golden, steps
from tests.conftest import changed
from tests.tiny import preference_rows


def pairs(folder):
    return [row for part in ("train", "held_out") for row in read_shards(folder / "dpo_tokens", part)]


def key(row):
    return sorted(row.items())


def dropped(folder):
    return [(row, reason) for row, reason, _ in steps.dropped(folder, "dpo")]


def test_every_pair_is_there_once(settings, model, tokenizer, tmp_path):
    rows = preference_rows()
    account = steps.tokenize_dpo(settings, model, rows, tmp_path)
    expected = ChatTokens(tokenizer).pairs([to_pair(row, "sharegpt") for row in rows])
    assert sorted(pairs(tmp_path), key=key) == sorted(expected, key=key)
    total = account["total"]
    assert total["rows"]["train"] == 20 and total["rows"]["held_out"] == 4
    assert total["tokens"]["raw"] == sum(len(ids) for row in expected for ids in row.values())
    assert total["tokens"]["with_labels"] == sum(
        len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in expected
    )


def test_pairs_without_a_preference_leave(settings, model, tmp_path):
    same = preference_rows()[0] | {"rejected": preference_rows()[0]["chosen"]}
    long = {"from": "gpt", "value": "red " * 200}
    alike = {
        "conversations": [{"from": "human", "value": "go"}],
        "chosen": long,
        "rejected": {"from": "gpt", "value": long["value"] + "cat"},
    }
    long_prompt = {
        "conversations": [{"from": "human", "value": "go " * 200}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    rows = [*preference_rows(), same, alike, long_prompt, preference_rows()[2]]
    settings = changed(settings, {"tokenize.dpo.overlong": "truncate", "tokenize.dpo.max_dropped": 0.2})
    account = steps.tokenize_dpo(settings, model, rows, tmp_path)
    assert dropped(tmp_path) == [
        (24, "no_preference"),
        (25, "no_preference"),
        (26, "without_labels"),
        (27, "duplicate"),
    ]
    assert account["total"]["rows"]["no_preference"] == 2 and account["total"]["rows"]["train"] == 20


def test_completions_are_cut_to_what_the_prompt_leaves(settings, model, tokenizer, tmp_path):
    long = {
        "conversations": [{"from": "human", "value": "go"}],
        "chosen": {"from": "gpt", "value": "red " * 200},
        "rejected": {"from": "gpt", "value": "cat"},
    }
    truncating = changed(settings, {"tokenize.dpo.overlong": "truncate"})
    steps.tokenize_dpo(truncating, model, [*preference_rows(), long], tmp_path)
    (whole,) = ChatTokens(tokenizer).pairs([to_pair(long, "sharegpt")])
    (cut,) = (row for row in pairs(tmp_path) if row["prompt_ids"] == whole["prompt_ids"])
    assert cut["chosen_ids"] == whole["chosen_ids"][: 128 - len(whole["prompt_ids"])]
    assert cut["rejected_ids"] == whole["rejected_ids"]


def test_overlong_pairs_leave(settings, model, tmp_path):
    long = preference_rows()[0] | {"rejected": {"from": "gpt", "value": "red " * 200}}
    allowing = changed(settings, {"tokenize.dpo.max_dropped": 0.05})
    account = steps.tokenize_dpo(allowing, model, [*preference_rows(), long], tmp_path)
    assert account["total"]["rows"]["overlong"] == 1 and dropped(tmp_path) == [(24, "overlong")]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({"chosen": {"from": "gpt", "value": ""}}, "`value` of `chosen` is empty"),
        ({"chosen": {"from": "gpt", "value": "a\0b"}}, "`value` of `chosen` holds a NUL"),
        ({"rejected": {"from": "human", "value": "cat"}}, "turn 1 is the user's, expected the assistant's"),
        ({"conversations": []}, "`conversations` is empty"),
        ({"chosen": {"from": "gpt", "value": "a<|im_end|>"}}, "a text holds '<|im_end|>'"),
    ],
)
def test_a_bad_pair_is_accounted_for_or_fails_the_stage(bad, expected, settings, model, tmp_path):
    rows = [*preference_rows(), preference_rows()[0] | bad]
    with pytest.raises(InputError, match=r"tokenize\.dpo\.max_dropped: 1 of 25 rows of pairs"):
        steps.tokenize_dpo(settings, model, rows, tmp_path)
    steps.tokenize_dpo(changed(settings, {"tokenize.dpo.max_dropped": 0.05}), model, rows, tmp_path)
    ((row, reason, detail),) = steps.dropped(tmp_path, "dpo")
    assert (row, reason) == (24, "invalid") and expected in detail


@pytest.mark.parametrize("name", golden.PAIRS)
def test_every_format_goes_through(name, settings, model, tokenizer, tmp_path):
    template = json.dumps(golden.PAIRS[name])
    for words, numbered in (
        ("cat", "cat NUMBER"),
        ("green", "green NUMBER"),
        ('red"', 'red NUMBER"'),
        ('one"', 'one NUMBER"'),
        ('two"', 'two NUMBER"'),
        ('three"', 'three NUMBER"'),
    ):
        template = template.replace(words, numbered)
    rows = [json.loads(template.replace("NUMBER", str(n))) for n in range(12)]
    formatted = changed(settings, {"data.preferences.sources.pairs.format": name})
    steps.tokenize_dpo(formatted, model, rows, tmp_path)
    expected = ChatTokens(tokenizer).pairs([to_pair(row, name) for row in rows])
    assert sorted(pairs(tmp_path), key=key) == sorted(expected, key=key)
