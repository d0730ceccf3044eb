"""Rows of every format, and rows that do not fit theirs."""

import json

import pytest

from reprotune.data.formats import to_conversation, to_pair
from reprotune.data.json_rows import json_table
from reprotune.data.raw_rows import InvalidRow, NoPreference
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


def chat(*turns, **row):
    return {"messages": list(turns), **row}


def assistant(content="b", **more):
    return message("assistant", content) | more


QUESTION = message("user", "a")
CALL = {"id": "c1", "type": "function", "function": {"name": "sing", "arguments": '{"n": 1}'}}


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


@pytest.mark.parametrize(
    ("turn", "key"),
    [
        (QUESTION | {"name": "anna"}, "name"),
        (QUESTION | {"images": ["a.png"]}, "images"),
        (QUESTION | {"tool_calls": [CALL]}, "tool_calls"),
        (QUESTION | {"reasoning_content": "x"}, "reasoning_content"),
    ],
)
def test_a_key_of_a_turn_without_a_place_makes_the_row_invalid(turn, key):
    with pytest.raises(InvalidRow, match=rf"`{key}` of turn 0 is .*, which this format has no place for"):
        to_conversation(chat(turn, assistant()), "messages")
    assert to_conversation(chat(turn, assistant()), "messages", [key]).turns[0] == QUESTION
    with pytest.raises(InvalidRow, match="`label` of turn 1 is 0, which this format has no place for"):
        to_conversation(chat(QUESTION, assistant(label=0)), "messages")


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


@pytest.mark.parametrize("said", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}])
def test_a_turn_may_say_that_nothing_is_learned_from_it(said):
    row = chat(QUESTION, assistant(**said), QUESTION, assistant("c", weight=1, train=True))
    first, _, second = to_conversation(row, "messages").turns[1:]
    assert first["train"] is False and "train" not in second


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(QUESTION, assistant(weight=0.5)), "`weight` of turn 1 is 0.5, expected 0 or 1"),
        (chat(QUESTION, assistant(train="no")), "`train` of turn 1 is 'no', expected False or True"),
        (chat(QUESTION, assistant(train=[1])), "`train` of turn 1 is [1], expected"),
        (chat(QUESTION, assistant(weight=1, train=False)), "`train` of turn 1 contradict each other"),
        (chat(QUESTION | {"weight": 1}, assistant()), "`weight` of turn 0 asks to train on the user's turn"),
        (chat(QUESTION, assistant(thinking="x", reasoning="y")), "differ, expected one of them"),
        (chat(QUESTION, assistant(tool_calls="no")), "`tool_calls` of turn 1 is 'no', expected JSON"),
        (
            chat(QUESTION, assistant(tool_calls=[{"name": "f", "args": {"n": 1}}])),
            "`args` of a call in `tool_calls` of turn 1 is {'n': 1}, which this format has no place for",
        ),
        (
            chat(QUESTION, assistant(tool_calls=[{"function": {"name": "f", "comment": "x"}, "weight": 0}])),
            "ignore: [comment, weight]",
        ),
        (
            chat(QUESTION, assistant(tool_calls=[CALL, CALL]), message("tool", "x"), assistant()),
            "turn 1 has 2 calls, found 1 results, expected one each",
        ),
        (
            chat(QUESTION, assistant(tool_calls=[CALL]), message("tool", "x") | {"name": "hum"}, assistant()),
            "turn 2 is the result of 'hum', expected that of 'sing'",
        ),
        (
            chat(QUESTION, assistant("<think>so</think>x", reasoning_content="so")),
            "stands beside thoughts in `content`, expected one of them",
        ),
        (
            chat(QUESTION, assistant(tool_calls=[{"id": "x"}])),
            "`name` of a call in `tool_calls` of turn 1 is missing; keys are id",
        ),
        (
            chat(QUESTION, assistant(function_call={"name": "x", "arguments": "[1]"})),
            "`arguments` of a call in `function_call` of turn 1 is [1], expected an object",
        ),
        (chat(QUESTION, assistant(), tools="{}"), "`tools` is {}, expected a list of objects"),
        (chat(QUESTION, assistant(None)), "`content` of turn 1 is missing"),
        (
            chat(QUESTION, assistant(tool_calls=[CALL]), message("tool", "x")),
            "the last turn is the tool's, expected the assistant's",
        ),
        (chat(QUESTION, message("tool", "x"), assistant()), "turn 1 is the tool's, expected the assistant's"),
        (
            chat(
                QUESTION,
                assistant(tool_calls=[CALL]),
                message("tool", "x") | {"tool_call_id": "c2"},
                assistant(),
            ),
            "turn 2 is the result of 'c2', expected that of 'c1': in the order of the calls",
        ),
    ],
)
def test_a_turn_that_cannot_be_meant_says_why(row, expected):
    with pytest.raises(InvalidRow) as error:
        to_conversation(row, "messages")
    assert expected in str(error.value)


def test_calls_have_one_form_whatever_a_table_made_of_them():
    """JSON in a text, as OpenAI has it, an object with the keys of all rows, or ShareGPT's own turn."""
    called = {"type": "function", "function": {"name": "sing", "arguments": {"n": 1}}}
    forms = [
        assistant(None, tool_calls=[CALL]),
        assistant("", tool_calls=[{"function": {"name": "sing", "arguments": {"n": 1, "of": None}}}]),
        assistant(None, function_call={"name": "sing", "arguments": '{"n": 1}'}),
        assistant(None, tool_calls='[{"name": "sing", "arguments": {"n": 1}}]'),
        message("function_call", '{"name": "sing", "arguments": {"n": 1}}'),
        message("function_call", '{"name": "sing", "parameters": {"n": 1}}'),
    ]
    tool = {"type": "function", "function": {"name": "sing", "parameters": {"n": {"type": "integer"}}}}
    for form in forms:
        row = chat(
            QUESTION, form, message("tool", "la") | {"name": "sing"}, assistant(), tools=[tool | {"x": None}]
        )
        conversation = to_conversation(row, "messages")
        turn = conversation.turns[1]
        assert turn["content"] == "" and [call | {"id": 0} for call in turn["tool_calls"]] == [
            called | {"id": 0}
        ]
        assert conversation.turns[2] == message("tool", "la") | {"name": "sing"}
        assert list(conversation.tools) == [tool]
    given = CALL | {"function": {"name": "sing", "arguments": '{"of": null}'}}
    turn = to_conversation(chat(QUESTION, assistant(tool_calls=[given])), "messages").turns[1]
    assert turn["tool_calls"][0]["function"]["arguments"] == {"of": None}
    for key in ("reasoning_content", "reasoning", "thinking"):
        thought = to_conversation(chat(QUESTION, assistant(**{key: "so"})), "messages").turns[1]
        assert thought == assistant(reasoning_content="so")


@pytest.mark.parametrize("none", [[], "[]", "null", None])
def test_no_call_is_none(none, tmp_path):
    """As dumped messages of OpenAI's client have it, in JSON and in a table."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a", "tool_calls": none},
                {"role": "assistant", "content": content, "tool_calls": none},
            ]
        }
        for content in ("b", "")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    stored = json_table(tmp_path / "rows.json").to_pylist()
    for said, silent in (rows, stored):
        if isinstance(none, str):
            # a text is no list
            said["messages"][0].pop("tool_calls")
        assert to_conversation(said, "messages").turns[1] == {"role": "assistant", "content": "b"}
        with pytest.raises(InvalidRow, match=r"`content` of turn 1 is empty|`tool_calls` of turn 0"):
            to_conversation(silent, "messages")


def test_what_a_table_made_of_no_object_is_nothing():
    """A column of structs gives each row one, of nulls where it had none."""
    row = {
        "messages": [QUESTION, assistant(function_call={"name": None, "arguments": None})],
        "meta": {"a": None, "b": [None]},
        "images": [None],
    }
    assert to_conversation(row, "messages").turns[1] == {"role": "assistant", "content": "b"}


def test_what_is_ignored_is_still_read_where_nothing_works_without_it():
    """A user's name has no place, and a function has one."""
    row = {"messages": [QUESTION | {"name": "bob"}, assistant("", tool_calls=[CALL])]}
    with pytest.raises(InvalidRow, match=r"ignore: \[name\]"):
        to_conversation(row, "messages")
    question, answer = to_conversation(row, "messages", ["name"]).turns
    assert question == {"role": "user", "content": "a"}
    assert answer["tool_calls"][0]["function"] == {"name": "sing", "arguments": {"n": 1}}


def test_a_pair_without_a_prompt_is_invalid_with_a_system_prompt_too():
    row = {"system": "s", "chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]}
    with pytest.raises(InvalidRow, match="expected the"):
        to_pair(row, "ultrafeedback")


def test_thoughts_stand_in_one_place_in_every_format():
    turn = {"from": "gpt", "value": "<think>a</think>b", "reasoning_content": "c"}
    row = {"conversations": [{"from": "human", "value": "x"}, turn]}
    with pytest.raises(InvalidRow, match="stands beside thoughts in `value`"):
        to_conversation(row, "sharegpt")


def test_an_answer_of_a_pair_is_trained_on():
    row = {"chosen": [QUESTION, assistant(train=False)], "rejected": [QUESTION, assistant("c")]}
    with pytest.raises(InvalidRow, match="an answer of the pair says that it is not trained on"):
        to_pair(row, "ultrafeedback")
