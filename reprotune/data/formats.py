"""One small adapter for each source format: from a source's rows to conversations and preference pairs."""

import hashlib
from collections.abc import Callable

from reprotune.data.conversations import Conversation, Pair, checked
from reprotune.data.fields import assistant, blank, item, items, scored_completion, text, turn, without
from reprotune.data.raw_rows import InvalidRow, NoPreference, Row, readable


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
    return [turn(value, "from", "value") for value in items(row, "conversations")]


def messages(row: Row) -> Conversation:
    """{messages: [{role, content}]}, OpenAI's chat format."""
    without(row, "tools")
    return [turn(value, "role", "content") for value in items(row, "messages")]


def prompt_completion(row: Row) -> Conversation:
    """{prompt, completion}."""
    return [{"role": "user", "content": text(row, "prompt")}, assistant(row, "completion")]


def openorca(row: Row) -> Conversation:
    """{system_prompt, question, response}; the system prompt may be blank."""
    system = []
    if not blank(row, "system_prompt"):
        system = [{"role": "system", "content": text(row, "system_prompt")}]
    return [*system, {"role": "user", "content": text(row, "question")}, assistant(row, "response")]


def sharegpt_pair(row: Row) -> Pair:
    """{conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}}."""
    chosen, rejected = (turn(item(row, key), "from", "value") for key in ("chosen", "rejected"))
    return sharegpt(row), chosen, rejected


def ultrafeedback(row: Row) -> Pair:
    """{chosen: [{role, content}], rejected: [{role, content}]}, which differ in their last turn alone."""
    chosen, rejected = (
        [turn(value, "role", "content") for value in items(row, key)] for key in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRow("`chosen` and `rejected` differ before their last turn, expected one prompt")
    return chosen[:-1], chosen[-1], rejected[-1]


def scored(row: Row) -> Pair:
    """{instruction, completions: [{response, overall_score}]}: the best completion and one of a lower score.

    The hash of the instruction picks one of several lower ones. The pick looks random and never changes.
    """
    prompt = text(row, "instruction")
    completions = [scored_completion(value) for value in items(row, "completions")]
    best, chosen = max(completions, key=lambda completion: completion[0])
    lower = [completion for score, completion in completions if score < best]
    if not lower:
        raise NoPreference(
            f"all {len(completions)} completions have the score {best:g}, expected a lower one to reject"
        )
    drawn = int.from_bytes(hashlib.sha256(prompt.encode()).digest()) % len(lower)
    return [{"role": "user", "content": prompt}], chosen, lower[drawn]


SFT_FORMATS: dict[str, Callable[[Row], Conversation]] = {
    adapter.__name__: adapter for adapter in (alpaca, sharegpt, messages, prompt_completion, openorca)
}
PREFERENCE_FORMATS: dict[str, Callable[[Row], Pair]] = {
    "sharegpt": sharegpt_pair,
    "ultrafeedback": ultrafeedback,
    "scored": scored,
}


def to_conversation(row: Row, name: str) -> Conversation:
    """Convert a row of the SFT format `name`.

    Raises:
        InvalidRow: with what was found and what was expected.
    """
    return checked(SFT_FORMATS[name](readable(row)))


def to_pair(row: Row, name: str) -> Pair:
    """Convert a row of the preference format `name`; raises InvalidRow like `to_conversation`."""
    prompt, chosen, rejected = PREFERENCE_FORMATS[name](readable(row))
    if chosen == rejected:
        raise NoPreference("`chosen` equals `rejected`")
    for completion in (chosen, rejected):
        checked([*prompt, completion])
    return prompt, chosen, rejected
