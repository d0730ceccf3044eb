"""Conversations and preference pairs, the forms that every source format is converted to.

At most one system turn comes first, then user and assistant alternate, the assistant last.
"""

from reprotune.data.raw_rows import InvalidRow

Turn = dict[str, str]
"""{role, content}. Alpaca's input stays under a key of its own, `input`: templates place it differently."""
Conversation = list[Turn]
Pair = tuple[Conversation, Turn, Turn]
"""Prompt, chosen completion, rejected completion."""


def checked(conversation: Conversation) -> Conversation:
    """The conversation itself; raises InvalidRow where its roles are out of order."""
    has_system = conversation and conversation[0]["role"] == "system"
    turns = conversation[1:] if has_system else conversation
    if not turns:
        raise InvalidRow("no turns, expected a user's and an assistant's")
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn["role"] != expected:
            number = len(conversation) - len(turns) + index
            raise InvalidRow(f"turn {number} is the {turn['role']}'s, expected the {expected}'s")
    if turns[-1]["role"] != "assistant":
        raise InvalidRow("the last turn is the user's, expected the assistant's")
    return conversation


def conversation_texts(conversation: Conversation) -> list[str]:
    """All text that people or models wrote in it."""
    return [text for turn in conversation for key, text in turn.items() if key != "role"]


def pair_texts(pair: Pair) -> list[str]:
    prompt, chosen, rejected = pair
    return conversation_texts([*prompt, chosen, rejected])
