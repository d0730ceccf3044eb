"""What a conversation may have beside its turns' content, and which of it a chat template renders."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from reprotune.data.conversations import Conversation, Turn
from reprotune.data.raw_rows import InvalidRow
from reprotune.data.rendering import ANSWER, USER, render

CALL = {"type": "function", "function": {"name": "the_call", "arguments": {"of": "what is asked"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "the_tool",
        "description": "what it does",
        "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
    },
}
PLACES: dict[str, tuple[Conversation, tuple[str, ...]]] = {
    "reasoning_content": (
        Conversation(
            [
                USER,
                ANSWER | {"reasoning_content": "what it thinks"},
                USER,
                ANSWER | {"reasoning_content": "what it adds"},
            ]
        ),
        ("what it thinks", "what it adds", ANSWER["content"]),
    ),
    "tools": (Conversation([USER, ANSWER], [TOOL]), ("the_tool", "what it does")),
    "tool_calls": (
        Conversation([USER, ANSWER | {"tool_calls": [CALL]}]),
        ("the_call", "what is asked", ANSWER["content"]),
    ),
    "tool": (
        Conversation([USER, ANSWER, {"role": "tool", "content": "what it gives"}, ANSWER]),
        ("what it gives",),
    ),
    "input": (Conversation([USER | {"input": "what is given"}, ANSWER]), ("what is given",)),
}
"""What a conversation may have and a template may have no place for, with texts that must be rendered."""


def places(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Those of PLACES that the tokenizer's template renders."""
    found = set()
    for name, (conversation, texts) in PLACES.items():
        try:
            ((rendered, _),) = render(tokenizer, [conversation])
        except InvalidRow:
            continue
        if all(text in rendered for text in texts):
            found.add(name)
    return found


def parts_of(conversation: Conversation) -> Iterator[str]:
    """Those of PLACES that a conversation cannot do without."""
    if conversation.tools:
        yield "tools"
    for turn in conversation.turns:
        yield from needs_of(turn)


def needs_of(turn: Turn) -> Iterator[str]:
    if turn["role"] == "tool":
        yield "tool"
    yield from (key for key in ("reasoning_content", "tool_calls") if turn.get(key))
