"""A run's chat template as it is published: without the marks of what was trained on.

`{% generation %}` is an extension of transformers', which llama.cpp, text-generation-webui and plain Jinja
refuse.
"""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reprotune.data.conversations import Conversation
from reprotune.data.rendering import ANSWER, SYSTEM, USER
from reprotune.data.template_places import PLACES, TOOL
from reprotune.errors import InputError

NOT_A_MARK = (
    r"\{#.*?#\}",
    r"\{%[-+]?\s*raw\s*[-+]?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}",
    r"""\{\{(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|.)*?\}\}""",
)
"""What may hold a mark's text and is no mark: comments, raw text, strings."""
A_MARK = r"\{%(?P<left>[-+]?)\s*(?:end)?generation\s*(?P<right>[-+]?)%\}"
STATEMENT = r"""\{%(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|.)*?%\}"""
MARK = re.compile("|".join([*NOT_A_MARK, A_MARK, STATEMENT]), re.DOTALL)
ROUNDS = [USER, ANSWER, USER, ANSWER]
TRIED = [
    Conversation([SYSTEM, *ROUNDS]),
    Conversation(ROUNDS),
    *(conversation for conversation, _ in PLACES.values()),
    Conversation(
        [
            SYSTEM,
            *(turn for conversation, _ in PLACES.values() for turn in conversation.turns),
            *ROUNDS,
        ],
        [TOOL],
    ),
]
"""Conversations that a template is rendered with."""


def without_marks(template: str) -> str:
    """The template without the extension; an empty comment trims the whitespace around it as the mark did."""

    def replaced(found: re.Match[str]) -> str:
        return found[0] if found["left"] is None else f"{{#{found['left']} {found['right']}#}}"

    return MARK.sub(replaced, template)


def check(tokenizer: PreTrainedTokenizerBase, template: Path) -> None:
    """Refuse a template that renders otherwise without its marks.

    A mark hides the variables that are set inside it from what stands outside.

    Args:
        tokenizer: with this template.

    Raises:
        InputError: it does.
    """
    published = without_marks(tokenizer.chat_template)
    for conversation in TRIED:
        options = {"tools": list(conversation.tools) or None, "tokenize": False}
        try:
            marked = tokenizer.apply_chat_template(conversation.turns, **options)
        except Exception:
            # it refuses system turns or tools, in whatever way
            continue
        plain = tokenizer.apply_chat_template(conversation.turns, chat_template=published, **options)
        if plain != marked:
            raise InputError(
                f"{template}: without `{{% generation %}}`, which other programs do not know, it renders "
                f"{plain!r}, expected {marked!r}; set no variable inside it that is read outside"
            )
