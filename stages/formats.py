"""From a source's own rows to conversations and preference pairs: one small adapter a format.

A conversation is a list of turns {role, content}: at most one system turn, then user and assistant in turn, the assistant
last. Alpaca's separate input stays under a key of its own, `input`, because templates place it differently.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

Row = Mapping[str, Any]
Turn = dict[str, str]
Conversation = list[Turn]
Pair = tuple[Conversation, Turn, Turn]
"""Prompt, chosen answer, rejected answer."""

INVALID = "_invalid"
"""A raw table's column for rows that no table can hold: why not, and null for all others."""

ROLES = {"system": "system", "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant"}
"""Names of roles in published data."""


class InvalidRow(ValueError):
    """A row that cannot be trained on: it is left out and counted, with this reason."""


class NoPreference(InvalidRow):
    """A pair in which neither answer is better."""


def alpaca(row: Row) -> Conversation:
    """{instruction, input, output}; the input may be blank or missing."""
    without(row, "system", "history")
    user = {"role": "user", "content": text(row, "instruction")}
    if not blank(row, "input"):
        user["input"] = text(row, "input")
    return [user, assistant(row, "output")]


def sharegpt(row: Row) -> Conversation:
    """{conversations: [{from, value}]}."""
    without(row, "system", "tools")
    return [turn(item, "from", "value") for item in items(row, "conversations")]


def messages(row: Row) -> Conversation:
    """{messages: [{role, content}]}, as OpenAI's chat format has them."""
    without(row, "tools")
    return [turn(item, "role", "content") for item in items(row, "messages")]


def prompt_completion(row: Row) -> Conversation:
    """{prompt, completion}."""
    return [{"role": "user", "content": text(row, "prompt")}, assistant(row, "completion")]


def openorca(row: Row) -> Conversation:
    """{system_prompt, question, response}; the system prompt may be blank."""
    system = [{"role": "system", "content": text(row, "system_prompt")}] if not blank(row, "system_prompt") else []
    return [*system, {"role": "user", "content": text(row, "question")}, assistant(row, "response")]


def sharegpt_pair(row: Row) -> Pair:
    """{conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}}."""
    chosen, rejected = (turn(item(row, key), "from", "value") for key in ("chosen", "rejected"))
    return sharegpt(row), chosen, rejected


def ultrafeedback(row: Row) -> Pair:
    """{chosen: [{role, content}], rejected: [{role, content}]}, two conversations that differ in their last turn."""
    chosen, rejected = ([turn(part, "role", "content") for part in items(row, key)] for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRow("`chosen` and `rejected` differ before their last turn, expected one prompt")
    return chosen[:-1], chosen[-1], rejected[-1]


def scored(row: Row) -> Pair:
    """{instruction, completions: [{response, overall_score}]}: the best completion against one of a lower score.

    Where several are lower, the instruction's own hash draws one: as good as a random draw, and always the same.
    """
    prompt = text(row, "instruction")
    completions = [(number(part, "overall_score"), assistant(part, "response")) for part in map(completion, items(row, "completions"))]
    best, chosen = max(completions, key=lambda scored_answer: scored_answer[0])
    lower = [answer for score, answer in completions if score < best]
    if not lower:
        raise NoPreference(f"all {len(completions)} completions have the score {best:g}, expected a lower one to reject")
    drawn = int.from_bytes(hashlib.sha256(prompt.encode()).digest()) % len(lower)
    return [{"role": "user", "content": prompt}], chosen, lower[drawn]


SFT_FORMATS: dict[str, Callable[[Row], Conversation]] = {
    function.__name__: function for function in (alpaca, sharegpt, messages, prompt_completion, openorca)
}
PREFERENCE_FORMATS: dict[str, Callable[[Row], Pair]] = {"sharegpt": sharegpt_pair, "ultrafeedback": ultrafeedback, "scored": scored}


def to_conversation(row: Row, name: str) -> Conversation:
    """Convert a row of the SFT format `name`.

    Raises:
        InvalidRow: saying what was found and what was expected.
    """
    return checked(SFT_FORMATS[name](readable(row)))


def to_pair(row: Row, name: str) -> Pair:
    """Convert a row of the preference format `name`; raises InvalidRow like `to_conversation`."""
    prompt, chosen, rejected = PREFERENCE_FORMATS[name](readable(row))
    if chosen == rejected:
        raise NoPreference("`chosen` equals `rejected`")
    for answer in (chosen, rejected):
        checked([*prompt, answer])
    return prompt, chosen, rejected


def conversation_texts(conversation: Conversation) -> list[str]:
    """All that people or models wrote in it."""
    return [found for part in conversation for key, found in part.items() if key != "role"]


def pair_texts(pair: Pair) -> list[str]:
    prompt, chosen, rejected = pair
    return conversation_texts([*prompt, chosen, rejected])


def rows_of(batch: pa.RecordBatch) -> list[Row]:
    """The rows of a raw table; one with a value that Python cannot hold (a text that is not UTF-8, a date beyond its calendar) is
    invalid."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [{INVALID: f"a value cannot be read: {error}"}]
        return [row for index in range(batch.num_rows) for row in rows_of(batch.slice(index, 1))]


def readable(row: Row) -> Row:
    if row.get(INVALID) is not None:
        raise InvalidRow(row[INVALID])
    return row


def checked(conversation: Conversation) -> Conversation:
    """The conversation, if its roles are in order."""
    turns = conversation[1:] if conversation and conversation[0]["role"] == "system" else conversation
    if not turns:
        raise InvalidRow("no turns, expected a user's and an assistant's")
    for index, part in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if part["role"] != expected:
            raise InvalidRow(f"turn {len(conversation) - len(turns) + index} is the {part['role']}'s, expected the {expected}'s")
    if turns[-1]["role"] != "assistant":
        raise InvalidRow("the last turn is the user's, expected the assistant's")
    return conversation


def assistant(row: Row, key: str) -> Turn:
    return {"role": "assistant", "content": text(row, key)}


def turn(part: Any, role_key: str, content_key: str) -> Turn:
    if not isinstance(part, Mapping):
        raise InvalidRow(f"a turn is {shown(part)}, expected an object with `{role_key}` and `{content_key}`")
    role = text(part, role_key)
    if role not in ROLES:
        raise InvalidRow(f"`{role_key}` is {shown(role)}, expected one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": text(part, content_key)}


def completion(part: Any) -> Row:
    if not isinstance(part, Mapping):
        raise InvalidRow(f"a completion is {shown(part)}, expected an object with `response` and `overall_score`")
    return part


def blank(row: Row, key: str) -> bool:
    found = row.get(key)
    return found is None or (isinstance(found, str) and not found.strip())


def without(row: Row, *keys: str) -> None:
    """What stands under these keys would be lost without a word."""
    for key in keys:
        if not blank(row, key) and row[key] != []:
            raise InvalidRow(f"`{key}` is {shown(row[key])}, which this format has no place for; make it turns of `messages`")


def item(row: Row, key: str) -> Any:
    if row.get(key) is None:
        raise InvalidRow(f"`{key}` is missing; keys are {', '.join(name for name, value in row.items() if value is not None) or 'none'}")
    return row[key]


def items(row: Row, key: str) -> list[Any]:
    found = item(row, key)
    if not isinstance(found, list):
        raise InvalidRow(f"`{key}` is {shown(found)}, expected a list")
    if not found:
        raise InvalidRow(f"`{key}` is empty")
    return found


def text(row: Row, key: str) -> str:
    found = item(row, key)
    if not isinstance(found, str):
        raise InvalidRow(f"`{key}` is {shown(found)}, expected a text")
    if not found.strip():
        raise InvalidRow(f"`{key}` is empty")
    if "\0" in found:
        raise InvalidRow(f"`{key}` holds a NUL character, expected text")
    return found


def number(row: Row, key: str) -> float:
    found = item(row, key)
    if isinstance(found, bool) or not isinstance(found, int | float) or found != found:
        raise InvalidRow(f"`{key}` is {shown(found)}, expected a number")
    return float(found)


def shown(value: Any) -> str:
    """A value in a message, cut to a readable length."""
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:57]}..."
