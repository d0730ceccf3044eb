"""One small adapter for each source format: from a source's rows to conversations and preference pairs.

A row of any format may have its system prompt under `system`, and the tools of its calls under `tools`.
"""

import hashlib
from collections.abc import Callable, Collection

from reprotune.data.conversations import Conversation, Pair, Turn
from reprotune.data.fields import Fields
from reprotune.data.raw_rows import InvalidRow, NoPreference, Row, readable
from reprotune.data.turns import all_turns, tools, turn, with_system


def alpaca(row: Fields) -> list[Turn]:
    """{instruction, input, output}; the input may be blank or missing."""
    user = {"role": "user", "content": row.text("instruction")}
    if row.get("input") is not None:
        user["input"] = row.text("input")
    return [user, assistant(row, "output")]


def sharegpt(row: Fields) -> list[Turn]:
    """{conversations: [{from, value}]}."""
    return all_turns(row, "conversations", "from", "value")


def messages(row: Fields) -> list[Turn]:
    """{messages: [{role, content}]}, OpenAI's chat format."""
    return all_turns(row, "messages", "role", "content")


def prompt_completion(row: Fields) -> list[Turn]:
    """{prompt, completion}."""
    return [{"role": "user", "content": row.text("prompt")}, assistant(row, "completion")]


def openorca(row: Fields) -> list[Turn]:
    """{system_prompt, question, response}; the system prompt may be blank."""
    turns = [{"role": "user", "content": row.text("question")}, assistant(row, "response")]
    return with_system(row, turns, "system_prompt")


Answers = tuple[list[Turn], Turn, Turn]
"""The turns of the prompt, the chosen completion and the rejected one."""


def sharegpt_pair(row: Fields) -> Answers:
    """{conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}}."""
    chosen, rejected = (
        turn(row, row.item(key), f"`{key}`", "from", "value") for key in ("chosen", "rejected")
    )
    return sharegpt(row), chosen, rejected


def ultrafeedback(row: Fields) -> Answers:
    """{chosen: [{role, content}], rejected: [{role, content}]}, which differ in their last turn alone."""
    chosen, rejected = (all_turns(row, key, "role", "content") for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRow("`chosen` and `rejected` differ before their last turn, expected one prompt")
    return chosen[:-1], chosen[-1], rejected[-1]


def scored(row: Fields) -> Answers:
    """{instruction, completions: [{response, overall_score}]}: the best completion and one of a lower score.

    The hash of the instruction picks one of several lower ones. The pick looks random and never changes.
    """
    prompt = row.text("instruction")
    completions = [
        row.object(value, f"completion {number}", ("response", "overall_score"))
        for number, value in enumerate(row.items("completions"))
    ]
    by_score = [(one.number("overall_score"), assistant(one, "response")) for one in completions]
    best, chosen = max(by_score, key=lambda completion: completion[0])
    lower = [completion for score, completion in by_score if score < best]
    if not lower:
        raise NoPreference(
            f"all {len(completions)} completions have the score {best:g}, expected a lower one to reject"
        )
    drawn = int.from_bytes(hashlib.sha256(prompt.encode()).digest()) % len(lower)
    return [{"role": "user", "content": prompt}], chosen, lower[drawn]


def assistant(row: Fields, key: str) -> Turn:
    return {"role": "assistant", "content": row.text(key)}


SFT_FORMATS: dict[str, Callable[[Fields], list[Turn]]] = {
    adapter.__name__: adapter for adapter in (alpaca, sharegpt, messages, prompt_completion, openorca)
}
PREFERENCE_FORMATS: dict[str, Callable[[Fields], Answers]] = {
    "sharegpt": sharegpt_pair,
    "ultrafeedback": ultrafeedback,
    "scored": scored,
}


def to_conversation(row: Row, name: str, ignore: Collection[str] = ()) -> Conversation:
    """Convert a row of the SFT format `name`, without its fields in `ignore`.

    Raises:
        InvalidRow: with what was found and what was expected.
    """
    fields = Fields(readable(row), ignore)
    conversation = Conversation(with_system(fields, SFT_FORMATS[name](fields)), tools(fields))
    fields.close()
    return conversation.checked()


def to_pair(row: Row, name: str, ignore: Collection[str] = ()) -> Pair:
    """Convert a row of the preference format `name`; raises InvalidRow like `to_conversation`."""
    fields = Fields(readable(row), ignore)
    turns, chosen, rejected = PREFERENCE_FORMATS[name](fields)
    prompt = Conversation(with_system(fields, turns), tools(fields))
    fields.close()
    if chosen == rejected:
        raise NoPreference("`chosen` equals `rejected`")
    for answer in (chosen, rejected):
        if "train" in answer:
            raise InvalidRow("an answer of the pair says that it is not trained on")
        prompt.answered(answer).checked()
    return prompt, chosen, rejected
