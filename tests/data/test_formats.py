"""Rows of every format, and rows that do not fit theirs."""

import pytest

from reprotune.data.formats import to_conversation, to_pair
from reprotune.data.raw_rows import InvalidRow, NoPreference
from tests.data.examples import QUESTION, assistant, chat, message
from tests.golden import PAIRS, ROWS


def test_alpaca_keeps_its_input_apart():
    user, answer = to_conversation(ROWS["alpaca"], "alpaca").turns
    assert user == {"role": "user", "content": "say red cat", "input": "two dog"}
    assert answer == {"role": "assistant", "content": "red cat two dog"}
    for input_text in ("", " ", None):
        assert "input" not in to_conversation(ROWS["alpaca"] | {"input": input_text}, "alpaca").turns[0]
    assert "input" not in to_conversation({"instruction": "a", "output": "b"}, "alpaca").turns[0]


def test_openorca_may_have_no_system_prompt():
    conversation = to_conversation(ROWS["openorca"] | {"system_prompt": ""}, "openorca")
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]


def test_scored_takes_the_best_and_a_lower_one():
    prompt, chosen, rejected = to_pair(PAIRS["scored"], "scored")
    assert chosen["content"] == "green tree" and rejected["content"] in ("big house", "small house")
    others = [PAIRS["scored"] | {"instruction": f"three {n}"} for n in range(20)]
    assert {to_pair(row, "scored")[2]["content"] for row in others} == {"big house", "small house"}
    assert prompt.turns == [{"role": "user", "content": "three"}]


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
            "turn 0 is 'hello', expected an object with `role` and `content`",
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
        (
            "messages",
            {"messages": [message("judge", "a")]},
            "`role` of turn 0 is 'judge', expected one of system",
        ),
        ("messages", {"messages": [message("tool", "a")]}, "turn 0 is the tool's, expected the user's"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "`value` of turn 0 is missing"),
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
        ("sharegpt", PAIRS["sharegpt"] | {"chosen": "yes"}, InvalidRow, "`chosen` is 'yes'"),
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
            "completion 0 is 1.0, expected an object",
        ),
        (
            "scored",
            {"instruction": "a", "completions": [{"response": "x", "overall_score": "high"}]},
            InvalidRow,
            "`overall_score` of completion 0 is 'high', expected a number",
        ),
    ],
)
def test_a_bad_pair_says_why(name, row, kind, expected):
    with pytest.raises(InvalidRow) as error:
        to_pair(row, name)
    assert type(error.value) is kind and expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "row", "key", "value"),
    [
        ("messages", chat(QUESTION, assistant()), "loss_mask", [0, 1]),
        ("messages", chat(QUESTION, assistant()), "chat_template_kwargs", {"enable_thinking": False}),
        ("messages", chat(QUESTION, assistant()), "functions", [{"name": "sing"}]),
        ("alpaca", {"instruction": "a", "output": "b"}, "history", [["q", "a"]]),
        ("alpaca", {"instruction": "a", "output": "b"}, "weight", 0),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, "label", False),
        ("openorca", {"question": "a", "response": "b"}, "mask", "no"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "mask", 0),
    ],
)
def test_a_key_without_a_place_makes_the_row_invalid_unless_it_is_ignored(name, row, key, value):
    if name == "sharegpt":
        row = {"conversations": [*row["conversations"], {"from": "gpt", "value": "b"}]}
    expected = to_conversation(row, name)
    with pytest.raises(
        InvalidRow, match=rf"`{key}` is .*, which this format has no place for; .*ignore: \[{key}\]"
    ):
        to_conversation(row | {key: value}, name)
    assert to_conversation(row | {key: value}, name, [key]) == expected
    for blank in (None, "", [], {}, " "):
        assert to_conversation(row | {key: blank}, name) == expected
    assert (
        to_conversation(row | {"system": "be red", "tools": "no JSON"}, name, ["system", "tools"]) == expected
    )
    assert to_conversation(row | {"id": "x.1", "conversation_id": 3, "license": "MIT"}, name) == expected
    for meant in ("source", "split", "system_prompt_id"):
        with pytest.raises(InvalidRow, match=f"`{meant}` is 'x', which this format has no place for"):
            to_conversation(row | {meant: "x"}, name)


@pytest.mark.parametrize("key", ["prompt", "messages", "score_chosen", "chosen_weight"])
def test_a_pair_with_a_key_without_a_place_is_invalid_unless_it_is_ignored(key):
    for name, row in PAIRS.items():
        with pytest.raises(InvalidRow, match=f"`{key}` is 0.5, which this format has no place for"):
            to_pair(row | {key: 0.5}, name)
        assert to_pair(row | {key: 0.5}, name, [key]) == to_pair(row, name)
    completion = {"response": "x", "overall_score": 9.0, "custom_system_prompt": "be rude"}
    row = PAIRS["scored"] | {"completions": [*PAIRS["scored"]["completions"], completion]}
    with pytest.raises(InvalidRow, match="`custom_system_prompt` of completion 3 is 'be rude'"):
        to_pair(row, "scored")


@pytest.mark.parametrize(("name", "row"), list(ROWS.items()))
def test_a_row_of_any_format_may_have_its_system_prompt_apart(name, row):
    conversation = to_conversation(row, name)
    if conversation.turns[0]["role"] == "system":
        with pytest.raises(InvalidRow, match="`system` stands beside a system turn, expected one of them"):
            to_conversation(row | {"system": "be red"}, name)
    else:
        first, *others = to_conversation(row | {"system": "be red"}, name).turns
        assert first == message("system", "be red") and others == conversation.turns
    assert to_conversation(row | {"system": ""}, name) == conversation


@pytest.mark.parametrize(("name", "row"), list(PAIRS.items()))
def test_a_pair_of_any_format_may_have_its_system_prompt_apart(name, row):
    prompt, chosen, rejected = to_pair(row | {"system": "be red"}, name)
    assert prompt.turns[0] == message("system", "be red")
    assert (prompt.turns[1:], chosen, rejected) == (to_pair(row, name)[0].turns, *to_pair(row, name)[1:])


def test_what_a_table_made_of_no_object_is_nothing():
    """A column of structs gives each row one, of nulls where it had none."""
    row = {
        "messages": [QUESTION, assistant(function_call={"name": None, "arguments": None})],
        "meta": {"a": None, "b": [None]},
        "images": [None],
    }
    assert to_conversation(row, "messages").turns[1] == {"role": "assistant", "content": "b"}


def test_a_pair_without_a_prompt_is_invalid_with_a_system_prompt_too():
    row = {"system": "s", "chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]}
    with pytest.raises(InvalidRow, match="expected the"):
        to_pair(row, "ultrafeedback")


def test_an_answer_of_a_pair_is_trained_on():
    row = {"chosen": [QUESTION, assistant(train=False)], "rejected": [QUESTION, assistant("c")]}
    with pytest.raises(InvalidRow, match="an answer of the pair says that it is not trained on"):
        to_pair(row, "ultrafeedback")
