"""Tokenizing instruction rows: every row is accounted for and every example is whole, packed or not."""

import json
from unittest.mock import patch

import hypothesis
import pytest
from hypothesis import strategies as st

from reprotune.data import limiting, shards
from reprotune.data.chat_tokens import IGNORED
from reprotune.data.shards import read_shards
from reprotune.data.tables import write_table
from reprotune.errors import InputError
from reprotune.records import read_parquet
from tests import golden, steps
from tests.conftest import changed
from tests.data.examples import all_examples, examples, expected_examples
from tests.tiny import alpaca_rows


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_is_whole_and_there_once(packing, settings, model, tokenizer, tmp_path):
    settings = changed(settings, {"tokenize.sft.packing": packing})
    rows = alpaca_rows()
    account = steps.tokenize_sft(settings, model, rows, tmp_path)
    expected = expected_examples(tokenizer, rows)
    assert sorted(all_examples(tmp_path / "sft_tokens")) == sorted(expected)
    tokens = account["total"]["tokens"]
    assert tokens["raw"] == sum(len(ids) for ids, _ in expected)
    assert tokens["with_labels"] == sum(label != IGNORED for _, labels in expected for label in labels)
    lengths = [len(row["input_ids"]) for row in read_shards(tmp_path / "sft_tokens", "train")]
    assert max(lengths) <= 128 and (len(lengths) < 34) is packing
    assert account["shards"]["train"] == {
        "part": "train",
        "rows": len(lengths),
        "tokens": sum(lengths),
        "filled": pytest.approx(sum(lengths) / (128 * len(lengths))),
    }
    assert steps.dropped(tmp_path) == []


def test_the_account_counts_every_row(settings, model, tmp_path):
    long = {"instruction": "say it", "input": "", "output": "red cat " * 100}
    bad = {"instruction": "say nothing", "input": "", "output": " "}
    special = {"instruction": "say", "input": "", "output": "cat<|im_end|>dog"}
    again = alpaca_rows()[1] | {"instruction": alpaca_rows()[1]["instruction"].upper() + "  "}
    rows = [*alpaca_rows(), again, long, bad, special]
    account = steps.tokenize_sft(changed(settings, {"tokenize.sft.max_dropped": 0.07}), model, rows, tmp_path)
    assert {key: value for key, value in account["total"]["rows"].items() if value} == {
        "raw": 44,
        "invalid": 2,
        "duplicate": 1,
        "overlong": 1,
        "held_out": 6,
        "train": 34,
        "seen": 34,
    }
    (same, too_long, empty, holds) = steps.dropped(tmp_path)
    assert same == (40, "duplicate", f"the text of {tmp_path}/raw_sft/rows.parquet, row 1")
    assert too_long[:2] == (41, "overlong") and too_long[2].endswith("tokens, max_length is 128")
    assert empty == (42, "invalid", "`output` is empty")
    assert holds[:2] == (43, "invalid") and "a text holds '<|im_end|>'" in holds[2]


def test_too_many_dropped_rows_fail_the_stage(settings, model, tmp_path):
    settings = changed(settings, {"tokenize.sft.max_length": 32, "tokenize.sft.max_dropped": 0.05})
    expected = (
        r"tokenize\.sft\.max_dropped: \d+ of 40 rows .* expected at most 5\.0%(.|\n)*"
        r"rows\.parquet, row 0: overlong: \d+ tokens"
    )
    with pytest.raises(InputError, match=expected):
        steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    assert not (tmp_path / "sft_data.json").exists() and not (tmp_path / "sft_tokens").exists()


def test_too_few_rows_fail_the_stage(settings, model, tmp_path):
    expected = r"tokenize\.sft\.held_out: 6 of 6 rows are kept, expected more than the 6 to hold out"
    with pytest.raises(InputError, match=expected):
        steps.tokenize_sft(settings, model, alpaca_rows(6), tmp_path)


def test_overlong_rows_are_cut_or_refused_as_the_params_say(settings, model, tokenizer, tmp_path):
    long = {"instruction": "say it", "input": "", "output": "red cat " * 100}
    no_answer = {"instruction": "say it " * 100, "input": "", "output": "red"}
    rows = [*alpaca_rows(), long, no_answer]
    cut = {
        "tokenize.sft.overlong": "truncate",
        "tokenize.sft.max_dropped": 0.05,
        "tokenize.sft.packing": False,
    }
    account = steps.tokenize_sft(changed(settings, cut), model, rows, tmp_path)
    truncated = next(example for example in all_examples(tmp_path / "sft_tokens") if len(example[0]) == 128)
    ((ids, labels),) = expected_examples(tokenizer, [long])
    assert truncated == (ids[:128], labels[:128])
    assert account["total"]["rows"]["truncated"] == 1
    assert account["total"]["tokens"]["cut_off"] == len(ids) - 128
    assert account["total"]["rows"]["without_labels"] == 1
    assert steps.dropped(tmp_path)[0][:2] == (41, "without_labels")
    expected = r"rows\.parquet, row 40: \d+ tokens, max_length is 128, and tokenize\.sft\.overlong is error"
    with pytest.raises(InputError, match=expected):
        steps.tokenize_sft(changed(settings, {"tokenize.sft.overlong": "error"}), model, rows, tmp_path)


ANY_TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["red", "blue cat", "RED ", "the dog " * 60, "a<|im_end|>b", "\0", ""]),
)
ANY_ROW = st.fixed_dictionaries({"instruction": ANY_TEXT, "output": ANY_TEXT}, optional={"input": ANY_TEXT})


@hypothesis.settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    rows=st.lists(ANY_ROW, max_size=20),
    limit=st.one_of(st.none(), st.integers(1, 30)),
    weight=st.sampled_from([0.3, 1.0, 1.7]),
    overlong=st.sampled_from(["drop", "truncate"]),
    near=st.sampled_from([None, 0.5]),
    packing=st.booleans(),
)
def test_no_row_is_lost(rows, limit, weight, overlong, near, packing, settings, model, tmp_path_factory):
    """Raw is kept plus every reason for leaving; shards and the list of dropped rows agree with it."""
    folder = tmp_path_factory.mktemp("any")
    rows = [*alpaca_rows(12), *({"input": "", **row} for row in rows)]
    values = {
        "data.sft.mix.rows": {"limit": limit, "weight": weight},
        "tokenize.sft.overlong": overlong,
        "tokenize.sft.deduplicate.near": near,
        "tokenize.sft.packing": packing,
        "tokenize.sft.max_dropped": 1.0,
        "tokenize.sft.held_out": 1,
    }
    try:
        with (
            patch.object(limiting, "CHUNK", 7),
            patch.object(shards, "WINDOW", 5),
            patch.object(shards, "BATCH", 2),
        ):
            account = steps.tokenize_sft(changed(settings, values), model, rows, folder)
    except InputError as error:
        assert "held_out: " in str(error) or "no row is left to train on" in str(error)
        return
    counts, tokens = account["total"]["rows"], account["total"]["tokens"]
    dropped = steps.dropped(folder)
    kept = counts["train"] + counts["held_out"]
    assert counts["raw"] == len(rows) == counts["over_limit"] + len(dropped) + kept
    assert len({row for row, _, _ in dropped}) == len(dropped) and all(detail for _, _, detail in dropped)
    reasons = [reason for _, reason, _ in dropped]
    assert all(counts[reason] == reasons.count(reason) for reason in reasons)
    train, held_out = examples(folder / "sft_tokens", "train"), examples(folder / "sft_tokens", "held_out")
    assert (len(train), len(held_out)) == (counts["seen"], counts["held_out"])
    assert sum(len(ids) for ids, _ in train) == tokens["seen"]
    assert sum(len(ids) for ids, _ in held_out) == tokens["held_out"]
    assert not {str(ids) for ids, _ in train} & {str(ids) for ids, _ in held_out}
    assert all(any(label != IGNORED for label in labels) for _, labels in train + held_out)


@pytest.mark.parametrize("name", golden.ROWS)
def test_every_format_goes_through(name, settings, model, tokenizer, tmp_path):
    template = json.dumps(golden.ROWS[name])
    for word in ("cat", "34", "sings", "jumps", "one?", "three", "bird", "runs?"):
        template = template.replace(word, f"{word} NUMBER")
    rows = [json.loads(template.replace("NUMBER", str(n))) for n in range(12)]
    steps.tokenize_sft(changed(settings, {"data.sft.sources.rows.format": name}), model, rows, tmp_path)
    assert sorted(all_examples(tmp_path / "sft_tokens")) == sorted(expected_examples(tokenizer, rows, name))


def test_calls_keep_their_arguments_whatever_those_of_other_rows_are(settings, model, tokenizer, tmp_path):
    """A table has one type a column; a call has `n` as a number, as a text, as a list, or not at all."""
    arguments = [{"n": 1}, {"n": "1"}, {"n": [1, {"a": None}]}, {"m": None}, {}] * 3
    rows = [
        {
            "tools": [{"type": "function", "function": {"name": f"t{number}", "parameters": given}}],
            "messages": [
                {"role": "user", "content": f"call {number}"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "sing", "arguments": given}}],
                },
            ],
        }
        for number, given in enumerate(arguments)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(tmp_path / "rows.jsonl", tmp_path / "rows.parquet", "rows")
    raw = read_parquet(tmp_path / "rows.parquet").to_pylist()
    chats = changed(settings, {"data.sft.sources.rows.format": "messages", "tokenize.sft.max_length": 1024})
    steps.tokenize_sft(chats, model, raw, tmp_path)
    trained = {
        tokenizer.decode([label for label in labels if label != IGNORED])
        for _, labels in all_examples(tmp_path / "sft_tokens")
    }
    assert trained == {
        f'<tool_call>\n{{"name": "sing", "arguments": {json.dumps(given)}}}\n</tool_call><|im_end|>'
        for given in arguments
    }


def test_turns_that_are_not_trained_on_have_no_labels(settings, model, tokenizer, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"cat {n}?"},
                {"role": "assistant", "content": f"wrong {n}", "weight": 0},
                {"role": "user", "content": "no"},
                {"role": "assistant", "content": f"right {n}", "weight": int(n > 0)},
            ]
        }
        for n in range(12)
    ]
    chats = changed(settings, {"data.sft.sources.rows.format": "messages", "tokenize.sft.max_dropped": 0.1})
    account = steps.tokenize_sft(chats, model, rows, tmp_path)
    trained = [
        tokenizer.decode([label for label in labels if label != IGNORED])
        for _, labels in all_examples(tmp_path / "sft_tokens")
    ]
    assert sorted(trained) == sorted(f"right {n}<|im_end|>" for n in range(1, 12))
    assert account["total"]["rows"]["without_labels"] == 1
    assert steps.dropped(tmp_path) == [(0, "without_labels", "no turn of it is trained on")]
