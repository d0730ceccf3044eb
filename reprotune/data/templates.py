"""The run's chat template: loaded, checked, and made part of the base model's tokenizer.

The template marks what is trained on with `{% generation %}`: each assistant turn and its end-of-turn token.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from reprotune.data import published_template, vocabulary
from reprotune.data.conversations import Conversation, Turn
from reprotune.data.raw_rows import InvalidRow
from reprotune.errors import InputError, first_line
from reprotune.params import Model

Span = tuple[int, int]
"""Begin and end of a completion, with its end-of-turn token, in the rendered text."""

SYSTEM, USER, ANSWER = (
    {"role": role, "content": f"what the {role} says"} for role in ("system", "user", "assistant")
)
"""Turns that templates are tried on."""
AGAIN = "once more"
"""The content of a second user turn."""
TODAY = "the date of today"
CLOCK = f"{{%- macro strftime_now(format) -%}}{TODAY}{{%- endmacro -%}}"
"""Begins a template whose clock is tried."""
OWN = "own"
"""The name of the base model's own template, as `fetch_model` writes it."""
OWN_FILE = "own_template.jinja"
"""Its file in the base model's folder."""


def template_file(folder: Path, base: Path, model: Model) -> Path:
    """The file of the run's chat template."""
    return base / OWN_FILE if model.chat_template == OWN else folder / f"{model.chat_template}.jinja"


def load_tokenizer(base: Path, template: Path) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the run's chat template; eos is its end-of-turn token, pad another one.

    A base model's own eos ends texts, not turns. A model trained on one token and stopped at another never
    stops (seen with Qwen3 base models). If pad equalled eos, eos would be masked in the labels as padding.

    Where the base's tokenizer begins a text with a token, as Llama's and Gemma's do, so does the template.
    """
    tokenizer = bare_tokenizer(base)
    try:
        ended = with_template(tokenizer, template)
    except InputError as error:
        folder = Path("templates") if template.name == OWN_FILE else template.parent
        others = sorted(file for file in folder.glob("*.jinja") if file != template)
        fitting = [file.stem for file in others if fits(bare_tokenizer(base), file)]
        which = (
            f"templates that fit this base: {', '.join(fitting)}"
            if fitting
            else f"none in {folder} fits this base"
        )
        raise InputError(f"{error} ({which})") from error
    candidates, rows = pad_candidates(tokenizer, ended), vocabulary.embeddings(base)
    spare = [token for token in candidates if tokenizer.convert_tokens_to_ids(token) < rows]
    if not spare:
        raise InputError(
            f"{base}: no token is left for padding: the only special token is {ended!r}, which ends a turn, "
            "and there is none for the character NUL"
        )
    tokenizer.eos_token, tokenizer.pad_token = ended, spare[0]
    tokenizer.padding_side = "right"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id, (tokenizer.pad_token, tokenizer.eos_token)
    vocabulary.check_template(tokenizer, base, template)
    published_template.check(tokenizer, template)
    return tokenizer


def bare_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{base}: no tokenizer could be loaded ({first_line(error)}); `dvc checkout {base}` restores it"
        ) from error


def with_template(tokenizer: PreTrainedTokenizerBase, template: Path) -> str:
    """Give the tokenizer the template in a file, and return the token that ends its turns.

    Raises:
        InputError: the file is not UTF-8, or `end_of_turn` refuses it.
    """
    try:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{template}: not UTF-8 ({error})") from error
    ended = end_of_turn(tokenizer, template)
    if not asked(tokenizer, [USER]).startswith(beginning(tokenizer)):
        tokenizer.chat_template = f"{{{{- {beginning(tokenizer)!r} }}}}{tokenizer.chat_template}"
    return ended


def fits(tokenizer: PreTrainedTokenizerBase, template: Path) -> bool:
    try:
        with_template(tokenizer, template)
    except InputError:
        return False
    return True


def beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer puts before every text: its bos token, or nothing.

    Raises:
        InputError: it puts more there, or something behind a text, which an answer could not follow.
    """
    whole, plain = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    if whole == plain:
        return ""
    if tokenizer.bos_token is None or whole != [tokenizer.bos_token_id, *plain]:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer makes {tokenizer.convert_ids_to_tokens(whole)} of the "
            f"text 'a', expected at most its bos_token ({tokenizer.bos_token!r}) before it; "
            "correct the post_processor in its tokenizer.json"
        )
    return tokenizer.bos_token


def pad_candidates(tokenizer: PreTrainedTokenizerBase, ended: str) -> list[str]:
    """Tokens for padding, the best first: none of them is in a row or ends a turn.

    A tokenizer such as GPT-2's has one special token. No text holds a NUL, so that its token is free.
    """
    named = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token]
    others = sorted(special_tokens(tokenizer), key=lambda token: ("pad" not in token.lower(), token))
    taken = {None, ended, tokenizer.bos_token, *written(tokenizer)}
    candidates = [token for token in (*named, *others) if token not in taken]
    nul = tokenizer.convert_ids_to_tokens(tokenizer.encode("\0", add_special_tokens=False))
    return candidates + (nul if len(nul) == 1 else [])


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
        raise InputError(f"{template}: not a template that can be rendered ({first_line(error)})") from error
    # it may refuse system turns
    with suppress(InvalidRow, TemplateError):
        ends |= tried(tokenizer, template, [SYSTEM, *rounds])
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
    if TODAY in asked(tokenizer, turns[:-1], chat_template=CLOCK + tokenizer.chat_template):
        raise InputError(
            f"{template}: it writes the date of the day, so that no run could be repeated; "
            "write a fixed date in a copy of it in templates/"
        )
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(spans) != len(answers):
        raise InputError(
            f"{template}: {len(spans)} answers are marked in a conversation with {len(answers)}; "
            "put `{% generation %}` and `{% endgeneration %}` around each"
        )
    for turn in turns:
        if text.count(turn["content"]) < sum(other["content"] == turn["content"] for other in turns):
            raise InputError(
                f"{template}: a conversation with {turn['content']!r} in it is rendered without it: "
                f"{text!r}; render each turn, or refuse a role with raise_exception"
            )
    ends = set()
    for number, (begin, end) in zip(answers, spans, strict=True):
        prompt = asked(tokenizer, turns[:number])
        if not text[:end].startswith(prompt) or len(prompt) < begin:
            raise InputError(
                f"{template}: an answer is asked for with {prompt!r}, but follows {text[:begin]!r}; "
                "the two must be equal"
            )
        ends.add(text[begin:end].partition(turns[number]["content"])[2].rstrip())
    return ends


def lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template marks as part of an answer, and writes itself where it asks for one."""
    ((rendered, spans),) = render(tokenizer, [Conversation([USER, ANSWER])])
    return rendered[spans[0][0] : len(asked(tokenizer, [USER]))]


def asked(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], **values: Any) -> str:
    """What the template asks for an answer to these turns with."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **values)
    assert isinstance(text, str)
    return text


def written(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The added tokens that the template writes around what a conversation says."""
    ((text, spans),) = render(tokenizer, [Conversation([USER, ANSWER, USER, ANSWER])])
    begin, end = spans[0]
    around = text[:begin] + text[begin:end].partition(ANSWER["content"])[2] + text[end : spans[1][0]]
    return {token for token in map(str, tokenizer.added_tokens_decoder.values()) if token in around}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches tokens that no row's text may hold: they would be read as the end of a turn or of all."""
    tokens = special_tokens(tokenizer) | written(tokenizer)
    return re.compile("|".join(re.escape(token) for token in sorted(tokens)) or r"(?!)")


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
