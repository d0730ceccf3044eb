"""Rows of every format, and rows that do not fit theirs."""

import pytest

from reprotune.data.formats import to_conversation, to_pair
from reprotune.data.raw_rows import InvalidRow, NoPreference
from tests.golden import PAIRS, ROWS


def test_alpaca_keeps_its_input_apart():
    user, answer = to_conversation(ROWS["alpaca"], "alpaca")
    assert user == {"role": "user", "content": "say red cat", "input": "two dog"}
    assert answer == {"role": "assistant", "content": "red cat two dog"}
    for input_text in ("", " ", None):
        assert "input" not in to_conversation(ROWS["alpaca"] | {"input": input_text}, "alpaca")[0]
    assert "input" not in to_conversation({"instruction": "a", "output": "b"}, "alpaca")[0]


def test_openorca_may_have_no_system_prompt():
    conversation = to_conversation(ROWS["openorca"] | {"system_prompt": ""}, "openorca")
    assert [turn["role"] for turn in conversation] == ["user", "assistant"]


def test_scored_takes_the_best_and_a_lower_one():
    prompt, chosen, rejected = to_pair(PAIRS["scored"], "scored")
    assert chosen["content"] == "green tree" and rejected["content"] in ("big house", "small house")
    others = [PAIRS["scored"] | {"instruction": f"three {n}"} for n in range(20)]
    assert {to_pair(row, "scored")[2]["content"] for row in others} == {"big house", "small house"}
    assert prompt == [{"role": "user", "content": "three"}]


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("alpaca", {"instruction": "x"}, "`output` is missing; keys are instruction"),
        ("alpaca", {"instruction": "x", "output": None}, "`output` is missing"),
        ("alpaca", {"instruction": 3, "output": "y"}, "`instruction` is 3, expected a text"),
        ("alpaca", {"instruction": "x", "output": " \n"}, "`output` is empty"),
        ("alpaca", {"instruction": "x", "output": "a\0b"}, "`output` holds a NUL character"),
        ("alpaca", {}, "`instruction` is missing; keys are none"),
        ("messages", {"messages": []}, "`messages` is empty"),
        ("messages", {"messages": "hello"}, "`messages` is 'hello', expected a list"),
        (
            "messages",
            {"messages": ["hello"]},
            "a turn is 'hello', expected an object with `role` and `content`",
        ),
        (
            "messages",
            {"messages": [message("user", "a")]},
            "the last turn is the user's, expected the assistant's",
        ),
        ("messages", {"messages": [message("system", "a")]}, "no turns, expected a user's"),
        (
            "messages",
            {"messages": [message("assistant", "a")]},
            "turn 0 is the assistant's, expected the user's",
        ),
        (
            "messages",
            {"messages": [message("user", "a"), message("user", "b")]},
            "turn 1 is the user's, expected the assistant's",
        ),
        (
            "messages",
            {"messages": [message("user", "a"), message("assistant", "b"), message("system", "c")]},
            "turn 2 is the system's",
        ),
        ("messages", {"messages": [message("tool", "a")]}, "`role` is 'tool', expected one of system, human"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "`value` is missing"),
        ("sharegpt", {"_invalid": "line 3 is not JSON"}, "line 3 is not JSON"),
    ],
)
def test_a_bad_row_says_why(name, row, expected):
    with pytest.raises(InvalidRow) as error:
        to_conversation(row, name)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "row", "kind", "expected"),
    [
        (
            "ultrafeedback",
            PAIRS["ultrafeedback"] | {"rejected": PAIRS["ultrafeedback"]["chosen"]},
            NoPreference,
            "`chosen` equals `rejected`",
        ),
        (
            "ultrafeedback",
            PAIRS["ultrafeedback"] | {"rejected": [message("user", "other"), message("assistant", "b")]},
            InvalidRow,
            "expected one prompt",
        ),
        (
            "ultrafeedback",
            {"chosen": [message("user", "a")], "rejected": [message("user", "b")]},
            InvalidRow,
            "the last turn is the user's",
        ),
        ("sharegpt", PAIRS["sharegpt"] | {"chosen": "yes"}, InvalidRow, "a turn is 'yes'"),
        (
            "scored",
            {"instruction": "a", "completions": [{"response": "x", "overall_score": 1.0}] * 2},
            NoPreference,
            "all 2 completions have the score 1",
        ),
        (
            "scored",
            {"instruction": "a", "completions": [1.0, 2.0]},
            InvalidRow,
            "a completion is 1.0, expected an object",
        ),
        (
            "scored",
            {"instruction": "a", "completions": [{"response": "x", "overall_score": "high"}]},
            InvalidRow,
            "`overall_score` is 'high', expected a number",
        ),
    ],
)
def test_a_bad_pair_says_why(name, row, kind, expected):
    with pytest.raises(InvalidRow) as error:
        to_pair(row, name)
    assert type(error.value) is kind and expected in str(error.value)
