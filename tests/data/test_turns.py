"""Turns of a row: what is trained on, thoughts, calls and results of tools."""

import json

import pytest

from reprotune.data.formats import to_conversation
from reprotune.data.json_rows import json_table
from reprotune.data.raw_rows import InvalidRow
from tests.data.examples import CALL, QUESTION, assistant, chat, message


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


def test_what_is_ignored_is_still_read_where_nothing_works_without_it():
    """A user's name has no place, and a function has one."""
    row = {"messages": [QUESTION | {"name": "bob"}, assistant("", tool_calls=[CALL])]}
    with pytest.raises(InvalidRow, match=r"ignore: \[name\]"):
        to_conversation(row, "messages")
    question, answer = to_conversation(row, "messages", ["name"]).turns
    assert question == {"role": "user", "content": "a"}
    assert answer["tool_calls"][0]["function"] == {"name": "sing", "arguments": {"n": 1}}


def test_thoughts_stand_in_one_place_in_every_format():
    turn = {"from": "gpt", "value": "<think>a</think>b", "reasoning_content": "c"}
    row = {"conversations": [{"from": "human", "value": "x"}, turn]}
    with pytest.raises(InvalidRow, match="stands beside thoughts in `value`"):
        to_conversation(row, "sharegpt")
