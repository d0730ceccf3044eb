"""Conversations as text, through a tokenizer's chat template."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from reprotune.data.conversations import Conversation, Turn
from reprotune.data.raw_rows import InvalidRow
from reprotune.errors import first_line

Span = tuple[int, int]
"""Begin and end of a completion, with its end-of-turn token, in the rendered text."""

SYSTEM, USER, ANSWER = (
    {"role": role, "content": f"what the {role} says"} for role in ("system", "user", "assistant")
)
"""Turns that templates are tried on."""


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[tuple[str, list[Span]]]:
    """Each conversation's text, and the spans of its completions.

    Raises:
        InvalidRow: the template fails on one of them, whatever it raises.
    """
    texts, spans = [], []
    try:
        for group in by_tools(conversations):
            group_texts, group_spans = render_jinja_template(
                [conversation.turns for conversation in group],
                tools=list(group[0].tools) or None,
                chat_template=tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
            texts += group_texts
            spans += group_spans
    except Exception as error:
        raise InvalidRow(f"the template cannot render it ({first_line(error)})") from error
    return list(zip(texts, spans, strict=True))


def by_tools(conversations: Sequence[Conversation]) -> Iterator[list[Conversation]]:
    """Neighbours with the same tools: a template is rendered with the tools of one conversation at a time."""
    group: list[Conversation] = []
    for conversation in conversations:
        # in Python, 1 equals True
        if group and json.dumps(conversation.tools) != json.dumps(group[0].tools):
            yield group
            group = []
        group.append(conversation)
    if group:
        yield group


def asked(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], **values: Any) -> str:
    """What the template asks for an answer to these turns with."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **values)
    assert isinstance(text, str)
    return text
