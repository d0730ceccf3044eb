"""Whether a chat template can be trained with: it is tried on a few conversations."""

from contextlib import suppress
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from reprotune.data.conversations import Conversation, Turn
from reprotune.data.raw_rows import InvalidRow
from reprotune.data.rendering import ANSWER, SYSTEM, USER, asked, render
from reprotune.data.template_places import PLACES
from reprotune.errors import InputError, first_line

AGAIN = "once more"
"""The content of a second user turn."""
LONG = "a word, " * 10_000 + "the last"
"""A content that a template may cut."""
SHOWN = 300
"""Characters of a rendered text that a message shows."""
TODAY = "the date of today"
CLOCK = f"{{%- macro strftime_now(format) -%}}{TODAY}{{%- endmacro -%}}"
"""Begins a template whose clock is tried."""


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Path) -> str:
    """The token that the template writes behind an assistant's turn.

    Raises:
        InputError: the template marks no completion, renders another prompt than it generates from, loses
            content, writes the date, or ends a turn with anything but one token. It may refuse system turns.
    """
    rounds = [USER, ANSWER, USER | {"content": AGAIN}, ANSWER]
    try:
        ends = tried(tokenizer, template, rounds)
    except InputError:
        raise
    except Exception as error:
        # what the template raises is the cause
        reason = str(error.__cause__) if isinstance(error.__cause__, TemplateError) else first_line(error)
        raise InputError(f"{template}: not a template that can be rendered ({reason})") from error
    # it may refuse system turns
    with suppress(InvalidRow, TemplateError):
        ends |= tried(tokenizer, template, [SYSTEM, *rounds])
    ends |= tried(tokenizer, template, [USER | {"content": LONG}, ANSWER | {"content": LONG}])
    ends |= ends_beside(tokenizer, template)
    token, *others = sorted(ends)
    if others:
        raise InputError(f"{template}: answers end with {token!r} and with {others[0]!r}, expected one token")
    if token not in tokenizer.get_vocab() or len(tokenizer.encode(token, add_special_tokens=False)) != 1:
        raise InputError(
            f"{template}: an answer ends with {token!r}, expected one token of the base model's vocabulary"
        )
    return token


def tried(tokenizer: PreTrainedTokenizerBase, template: Path, turns: list[Turn]) -> set[str]:
    """What a template writes behind the answers of a conversation, once it has passed the other checks."""
    ((text, spans),) = render(tokenizer, [Conversation(turns)])
    check_clock(tokenizer, template, Conversation(turns[:-1]))
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(spans) != len(answers):
        raise InputError(
            f"{template}: {len(spans)} answers are marked in a conversation with {len(answers)}; "
            "put `{% generation %}` and `{% endgeneration %}` around each"
        )
    for turn in turns:
        if text.count(turn["content"]) < sum(other["content"] == turn["content"] for other in turns):
            raise InputError(
                f"{template}: a conversation with {shown(turn['content'])} in it is rendered without it: "
                f"{shown(text)}; render each turn whole, or refuse a role with raise_exception"
            )
    ends = set()
    for number, (begin, end) in zip(answers, spans, strict=True):
        prompt = asked(tokenizer, turns[:number])
        if not text[:end].startswith(prompt) or len(prompt) < begin:
            raise InputError(
                f"{template}: an answer is asked for with {shown(prompt)}, but follows "
                f"{shown(text[:begin])}; the two must be equal"
            )
        ends.add(text[begin:end].partition(turns[number]["content"])[2].rstrip())
    return ends


def ends_beside(tokenizer: PreTrainedTokenizerBase, template: Path) -> set[str]:
    """What a template writes behind the last answer where there are tools, calls or thoughts, as it can."""
    ends = set()
    for conversation, said in PLACES.values():
        with suppress(InvalidRow, TemplateError):
            ((text, spans),) = render(tokenizer, [conversation])
            check_clock(tokenizer, template, conversation)
            # answers with a call end behind the call
            if spans and conversation.turns[-1].get("tool_calls") is None and said[-1] in text:
                begin, end = spans[-1]
                ends.add(text[begin:end].rpartition(conversation.turns[-1]["content"])[2].rstrip())
    return ends


def check_clock(tokenizer: PreTrainedTokenizerBase, template: Path, conversation: Conversation) -> None:
    """Refuse a template that writes the date of the day."""
    tools = list(conversation.tools) or None
    clocked = CLOCK + tokenizer.chat_template
    if TODAY in asked(tokenizer, conversation.turns, tools=tools, chat_template=clocked):
        raise InputError(
            f"{template}: it writes the date of the day, so that no run could be repeated; "
            "write a fixed date in a copy of it in templates/"
        )


def shown(text: str) -> str:
    """A text as a message shows it."""
    if len(text) <= SHOWN:
        return repr(text)
    half = SHOWN // 2
    return f"{text[:half]!r} ... {text[-half:]!r} ({len(text):,} characters)"
