"""From conversations to tokens and labels, through the run's chat template.

Every assistant turn is trained on, its end-of-turn token included, and nothing else: what the template renders inside
`{% generation %}`. Prompt and answer are tokenized apart, so the tokens before an answer are those that the model sees
when it is asked to write one.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from stages import InputError, first_line
from stages.formats import Conversation, InvalidRow, Pair

IGNORED = -100
"""The label of a token that is not trained on, as torch's cross entropy takes it."""

Span = tuple[int, int]


def load_tokenizer(base: Path, template: Path) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the run's chat template, its end-of-turn token as eos and another token as pad.

    A base model ends texts with its own token and knows no turns: trained and asked with two different ends, it would
    never stop (seen with Qwen3 base models). A pad token equal to eos would be masked out of the labels with the padding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except Exception as error:
        raise InputError(f"{base}: no tokenizer could be loaded ({first_line(error)}); `dvc checkout {base}` restores it") from error
    try:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{template}: not UTF-8 ({error})") from error
    tokens = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, *sorted(special_tokens(tokenizer))]
    tokenizer.eos_token = end_of_turn(tokenizer, template)
    spare = [token for token in tokens if token not in (None, tokenizer.eos_token)]
    if not spare:
        raise InputError(f"{base}: no token is left for padding: the only special token is {tokenizer.eos_token!r}, which ends a turn")
    tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "right"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id, (tokenizer.pad_token, tokenizer.eos_token)
    return tokenizer


SYSTEM, USER, ANSWER = ({"role": role, "content": f"what the {role} says"} for role in ("system", "user", "assistant"))


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Path) -> str:
    """The token that the template writes behind an assistant's answer.

    Raises:
        InputError: the template marks no answer, asks for one with other words than it renders, ends it with no token, or loses a text.
            One that refuses system turns may do so.
    """
    try:
        ((rendered, spans),) = render(tokenizer, [[USER, ANSWER]])
        prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
        ((several, marked),) = render(tokenizer, [[USER | {"input": "what is given"}, ANSWER, USER | {"content": "once more"}, ANSWER]])
    except Exception as error:
        raise InputError(f"{template}: not a template that can be rendered ({first_line(error)})") from error
    if len(spans) != 1 or len(marked) != 2:
        raise InputError(
            f"{template}: {len(spans)} answers are marked in a conversation with one, {len(marked)} in one with two; "
            "put `{% generation %}` and `{% endgeneration %}` around each"
        )
    begin, end = spans[0]
    if rendered[:begin] != prompt:
        raise InputError(f"{template}: an answer is asked for with {prompt!r}, but follows {rendered[:begin]!r}; the two must be equal")
    for words in (USER["content"], "what is given", "once more"):
        if words not in several:
            raise InputError(f"{template}: a conversation with {words!r} in it is rendered without it: {several!r}")
    try:
        ((with_system, _),) = render(tokenizer, [[SYSTEM, USER, ANSWER]])
    except InvalidRow:
        with_system = SYSTEM["content"]
    if SYSTEM["content"] not in with_system:
        raise InputError(f"{template}: a system turn is rendered without its content: {with_system!r}; render it, or refuse it with raise_exception")
    token = rendered[begin:end].removeprefix(ANSWER["content"])
    if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id) or len(tokenizer.encode(token, add_special_tokens=False)) != 1:
        raise InputError(f"{template}: an answer ends with {token!r}, expected one token of the base model's vocabulary")
    return token


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """What may stand in no text that people wrote: it would be read as the end of a turn, or of everything."""
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    return re.compile("|".join(re.escape(token) for token in sorted(special_tokens(tokenizer))) or r"(?!)")


def render(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[tuple[str, list[Span]]]:
    """Each conversation's text, and where in it the answers with their end-of-turn tokens stand.

    Raises:
        InvalidRow: the template fails on one of them, whatever it raises.
    """
    try:
        texts, spans = render_jinja_template(
            list(conversations), chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
        )
    except Exception as error:
        raise InvalidRow(f"the template cannot render it ({first_line(error)})") from error
    return list(zip(texts, spans, strict=True))


def encode(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(list(strings), add_special_tokens=False)]


def tokenize(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[dict[str, list[int]]]:
    """{input_ids, labels} of whole conversations; labels are IGNORED outside answers and their end-of-turn tokens.

    Raises:
        InvalidRow: the template cannot render one, or does not mark all of its answers.
    """
    pieces, counts = [], []
    for conversation, (text, spans) in zip(conversations, render(tokenizer, conversations), strict=True):
        if len(spans) != (answers := sum(part["role"] == "assistant" for part in conversation)):
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
            prompt, answer = next(encoded), next(encoded)
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def tokenize_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[dict[str, list[int]]]:
    """{prompt_ids, chosen_ids, rejected_ids}; both answers end with the end-of-turn token. Raises InvalidRow like `tokenize`."""
    pieces = []
    for (text, spans), (other, other_spans) in zip(
        render(tokenizer, [[*prompt, chosen] for prompt, chosen, _ in pairs]),
        render(tokenizer, [[*prompt, rejected] for prompt, _, rejected in pairs]),
        strict=True,
    ):
        if not spans or not other_spans:
            raise InvalidRow("the template does not mark the answer")
        (begin, end), (other_begin, other_end) = spans[-1], other_spans[-1]
        if text[:begin] != other[:other_begin]:
            raise InvalidRow(f"the template lets an answer change its prompt: {text[:begin]!r} is not {other[:other_begin]!r}")
        pieces += [text[:begin], text[begin:end], other[other_begin:other_end]]
    encoded = encode(tokenizer, pieces)
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(encoded[0::3], encoded[1::3], encoded[2::3], strict=True)
    ]
