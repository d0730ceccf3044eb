"""Conversations and preference pairs, the forms that every source format is converted to.

At most one system turn comes first, then user and assistant alternate, the assistant last. Results of tools
stand between two turns of the assistant.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from reprotune.data.raw_rows import InvalidRow

Turn: TypeAlias = dict[str, Any]
"""{role, content}, as chat templates take it: role is system, user, assistant or tool, content a text.

A user's may have Alpaca's `input`, which some templates have a place for; an assistant's `reasoning_content`,
`tool_calls` and `train`, false where nothing is learned from it; a tool's `name` and `tool_call_id`.
"""
Tool: TypeAlias = dict[str, Any]
"""A tool that the assistant may call: its JSON schema."""


@dataclass(frozen=True)
class Conversation:
    turns: list[Turn]
    tools: Sequence[Tool] = ()

    def answered(self, answer: Turn) -> "Conversation":
        """The conversation with one more turn."""
        return Conversation([*self.turns, answer], self.tools)

    def checked(self) -> "Conversation":
        """The conversation itself; raises InvalidRow where its turns are out of order."""
        before, results = "start", 0
        for number, turn in enumerate(self.turns):
            role = turn["role"]
            if role not in FOLLOWS[before]:
                expected = " or the ".join(f"{name}'s" for name in FOLLOWS[before])
                raise InvalidRow(f"turn {number} is the {role}'s, expected the {expected}")
            if role == "tool" != before:
                results = number
            if before == "tool" != role:
                check_results(self.turns, results, number)
            before = role
        if before in ("start", "system"):
            raise InvalidRow("no turns, expected a user's and an assistant's")
        if before != "assistant":
            raise InvalidRow(f"the last turn is the {before}'s, expected the assistant's")
        return self

    def joined(self) -> "Conversation":
        """The conversation with each `input` behind the content of its turn."""
        return Conversation(
            [
                turn | {"content": f"{turn['content']}\n\n{turn['input']}", "input": ""}
                if turn.get("input")
                else turn
                for turn in self.turns
            ],
            self.tools,
        )

    def texts(self) -> Iterator[str]:
        """All text that people or models wrote in it, of tools and their calls each key and value."""
        for turn in self.turns:
            for key in ("content", "input", "reasoning_content", "name"):
                if turn.get(key):
                    yield turn[key]
            for call in turn.get("tool_calls", ()):
                yield from leaves(call["function"])
        yield from leaves(list(self.tools))

    def said(self) -> "Conversation":
        """The conversation without what many rows share: a system prompt and tools."""
        return Conversation([turn for turn in self.turns if turn["role"] != "system"])

    def identity(self) -> list[str]:
        """Texts that two rows share if one repeats the other: what they say, and where nothing is learned."""
        untrained = [f"{number}" for number, turn in enumerate(self.turns) if not turn.get("train", True)]
        return [*self.texts(), *untrained]


Pair: TypeAlias = tuple[Conversation, Turn, Turn]
"""Prompt, chosen completion, rejected completion."""

FOLLOWS = {
    "start": ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""By a turn's role, the roles that may come next."""


def check_results(turns: Sequence[Turn], first: int, end: int) -> None:
    """Raise InvalidRow if the results in `turns[first:end]` are not those of the calls before them, in order.

    Templates write no ids, and some no names: the order alone tells which call a result belongs to.
    """
    calls = turns[first - 1].get("tool_calls")
    if not calls:
        # the calls are part of a text
        return
    if end - first != len(calls):
        raise InvalidRow(
            f"turn {first - 1} has {len(calls)} calls, found {end - first} results, expected one each"
        )
    for number, call in zip(range(first, end), calls, strict=True):
        result = turns[number]
        for key, expected in (("tool_call_id", call.get("id")), ("name", call["function"]["name"])):
            if None not in (found := result.get(key), expected) and found != expected:
                raise InvalidRow(
                    f"turn {number} is the result of {found!r}, expected that of {expected!r}: in the order "
                    "of the calls"
                )


def leaves(value: Any) -> Iterator[str]:
    """The keys and values of nested objects and lists, as texts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)


def conversation_texts(conversation: Conversation) -> list[str]:
    return list(conversation.texts())


def first_prompt(conversation: Conversation) -> Conversation:
    """What stands before the first answer."""
    answers = (number for number, turn in enumerate(conversation.turns) if turn["role"] == "assistant")
    return Conversation(conversation.turns[: next(answers)], conversation.tools)


def pair_prompt(pair: Pair) -> Conversation:
    return pair[0]


def conversation_said(conversation: Conversation) -> list[str]:
    return list(conversation.said().texts())


def pair_said(pair: Pair) -> list[str]:
    prompt, chosen, rejected = pair
    return pair_texts((prompt.said(), chosen, rejected))


def pair_texts(pair: Pair) -> list[str]:
    prompt, *answers = pair
    return [*prompt.texts(), *Conversation(answers).texts()]
