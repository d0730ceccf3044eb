"""Conversations to tokens and labels, through the run's chat template.

The template marks what is trained on with `{% generation %}`: each assistant turn and its end-of-turn token.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from reprotune.data.conversations import Conversation, Pair
from reprotune.data.raw_rows import InvalidRow
from reprotune.errors import InputError, first_line
from reprotune.params import Model

IGNORED = -100
"""The label of a token without loss, as torch's cross entropy takes it."""

Span = tuple[int, int]
"""Begin and end of a completion, with its end-of-turn token, in the rendered text."""
Tokens = dict[str, list[int]]
"""A tokenized row by column."""

SYSTEM, USER, ANSWER = (
    {"role": role, "content": f"what the {role} says"} for role in ("system", "user", "assistant")
)
"""Turns that templates are tried on."""
GIVEN, AGAIN = "what is given", "once more"
"""Contents of a user turn's `input`, and of a second user turn."""


def template_file(folder: Path, model: Model) -> Path:
    """The file of the run's chat template."""
    return folder / f"{model.chat_template}.jinja"


def load_tokenizer(base: Path, template: Path) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the run's chat template; eos is its end-of-turn token, pad another one.

    A base model's own eos ends texts, not turns. A model trained on one token and stopped at another never
    stops (seen with Qwen3 base models). If pad equalled eos, eos would be masked in the labels as padding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{base}: no tokenizer could be loaded ({first_line(error)}); `dvc checkout {base}` restores it"
        ) from error
    try:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{template}: not UTF-8 ({error})") from error
    pad_candidates = [
        tokenizer.pad_token,
        tokenizer.eos_token,
        tokenizer.unk_token,
        *sorted(special_tokens(tokenizer)),
    ]
    tokenizer.eos_token = end_of_turn(tokenizer, template)
    spare = [token for token in pad_candidates if token not in (None, tokenizer.eos_token)]
    if not spare:
        raise InputError(
            f"{base}: no token is left for padding: "
            f"the only special token is {tokenizer.eos_token!r}, which ends a turn"
        )
    tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "right"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id, (tokenizer.pad_token, tokenizer.eos_token)
    return tokenizer


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Path) -> str:
    """The token that the template writes behind an assistant's turn.

    Raises:
        InputError: the template marks no completion, renders another prompt than it generates from, loses
            content, or ends a turn with anything but one token. It may refuse system turns.
    """
    try:
        ((rendered, spans),) = render(tokenizer, [[USER, ANSWER]])
        prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
        rounds = [USER | {"input": GIVEN}, ANSWER, USER | {"content": AGAIN}, ANSWER]
        ((two_rounds, two_spans),) = render(tokenizer, [rounds])
    except Exception as error:
        raise InputError(f"{template}: not a template that can be rendered ({first_line(error)})") from error
    if len(spans) != 1 or len(two_spans) != 2:
        raise InputError(
            f"{template}: {len(spans)} answers are marked in a conversation with one, "
            f"{len(two_spans)} in one with two; "
            "put `{% generation %}` and `{% endgeneration %}` around each"
        )
    begin, end = spans[0]
    if rendered[:begin] != prompt:
        raise InputError(
            f"{template}: an answer is asked for with {prompt!r}, but follows {rendered[:begin]!r}; "
            "the two must be equal"
        )
    check_content(tokenizer, template, two_rounds)
    token = rendered[begin:end].removeprefix(ANSWER["content"])
    if (
        tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)
        or len(tokenizer.encode(token, add_special_tokens=False)) != 1
    ):
        raise InputError(
            f"{template}: an answer ends with {token!r}, expected one token of the base model's vocabulary"
        )
    return token


def check_content(tokenizer: PreTrainedTokenizerBase, template: Path, two_rounds: str) -> None:
    """Refuse a template that renders a turn without its content."""
    for content in (USER["content"], GIVEN, AGAIN):
        if content not in two_rounds:
            raise InputError(
                f"{template}: a conversation with {content!r} in it is rendered without it: {two_rounds!r}"
            )
    try:
        ((with_system, _),) = render(tokenizer, [[SYSTEM, USER, ANSWER]])
    except InvalidRow:
        return
    if SYSTEM["content"] not in with_system:
        raise InputError(
            f"{template}: a system turn is rendered without its content: {with_system!r}; "
            "render it, or refuse it with raise_exception"
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens that no row's text may hold: they would be read as the end of a turn, or of everything."""
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(special_tokens(tokenizer))) or r"(?!)")


def render(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[tuple[str, list[Span]]]:
    """Each conversation's text, and the spans of its completions.

    Raises:
        InvalidRow: the template fails on one of them, whatever it raises.
    """
    try:
        texts, spans = render_jinja_template(
            list(conversations),
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise InvalidRow(f"the template cannot render it ({first_line(error)})") from error
    return list(zip(texts, spans, strict=True))


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def tokenize(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[Tokens]:
    """{input_ids, labels} of each conversation; labels are IGNORED outside completions.

    Prompts and completions are tokenized apart, so a prompt has the tokens that it has in generation.

    Raises:
        InvalidRow: the template cannot render one, or does not mark all of its completions.
    """
    pieces, counts = [], []
    for conversation, (text, spans) in zip(conversations, render(tokenizer, conversations), strict=True):
        answers = sum(turn["role"] == "assistant" for turn in conversation)
        if len(spans) != answers:
            raise InvalidRow(f"the template marks {len(spans)} of {answers} answers")
        done = 0
        for begin, end in spans:
            pieces += [text[done:begin], text[begin:end]]
            done = end
        counts.append(len(spans))
    encoded = iter(encode(tokenizer, pieces))
    rows = []
    for count in counts:
        ids: list[int] = []
        labels: list[int] = []
        for _ in range(count):
            prompt, completion = next(encoded), next(encoded)
            ids += prompt + completion
            labels += [IGNORED] * len(prompt) + completion
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def tokenize_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[Tokens]:
    """{prompt_ids, chosen_ids, rejected_ids} of each pair; both completions end with the end-of-turn token.

    Raises:
        InvalidRow: the template cannot render one, does not mark a completion, or renders two prompts.
    """
    pieces = []
    for (chosen_text, chosen_spans), (rejected_text, rejected_spans) in zip(
        render(tokenizer, [[*prompt, chosen] for prompt, chosen, _ in pairs]),
        render(tokenizer, [[*prompt, rejected] for prompt, _, rejected in pairs]),
        strict=True,
    ):
        if not chosen_spans or not rejected_spans:
            raise InvalidRow("the template does not mark the answer")
        chosen_begin, chosen_end = chosen_spans[-1]
        rejected_begin, rejected_end = rejected_spans[-1]
        prompt, rejected_prompt = chosen_text[:chosen_begin], rejected_text[:rejected_begin]
        if prompt != rejected_prompt:
            raise InvalidRow(
                f"the template lets an answer change its prompt: {prompt!r} is not {rejected_prompt!r}"
            )
        pieces += [
            prompt,
            chosen_text[chosen_begin:chosen_end],
            rejected_text[rejected_begin:rejected_end],
        ]
    encoded = encode(tokenizer, pieces)
    return [
        {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
        for prompt_ids, chosen_ids, rejected_ids in zip(
            encoded[0::3], encoded[1::3], encoded[2::3], strict=True
        )
    ]
