"""From conversations to tokens and labels, through the run's chat template.

Every assistant turn is trained on, its end-of-turn token included, and nothing else: what the template renders inside
`{% generation %}`. Prompt and answer are tokenized apart, so the tokens before an answer are those that the model sees
when it is asked to write one.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from stages import InputError
from stages.formats import Conversation, Pair

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
    except (OSError, ValueError) as error:
        raise InputError(f"{base}: no tokenizer could be loaded ({str(error).splitlines()[0]}); `dvc checkout {base}` restores it") from error
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokens = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, *sorted(special_tokens(tokenizer))]
    tokenizer.eos_token = end_of_turn(tokenizer, template)
    spare = [token for token in tokens if token not in (None, tokenizer.eos_token)]
    if not spare:
        raise InputError(f"{base}: no token is left for padding: the only special token is {tokenizer.eos_token!r}, which ends a turn")
    tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "right"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id, (tokenizer.pad_token, tokenizer.eos_token)
    return tokenizer


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Path) -> str:
    """The token that the template writes behind an assistant's answer.

    Raises:
        InputError: the template marks no answer, asks for one with other words than it renders, or ends it with no token.
    """
    user, answer = {"role": "user", "content": "x"}, "y"
    try:
        ((rendered, spans),) = render(tokenizer, [[user, {"role": "assistant", "content": answer}]])
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise InputError(f"{template}: not a template that can be rendered ({error})") from error
    if len(spans) != 1:
        raise InputError(f"{template}: {len(spans)} answers are marked in a conversation with one; put `{{% generation %}}` and `{{% endgeneration %}}` around it")
    begin, end = spans[0]
    if rendered[:begin] != prompt:
        raise InputError(f"{template}: an answer is asked for with {prompt!r}, but follows {rendered[:begin]!r}; the two must be equal")
    token = rendered[begin:end].removeprefix(answer)
    if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id) or len(tokenizer.encode(token, add_special_tokens=False)) != 1:
        raise InputError(f"{template}: an answer ends with {token!r}, expected one token of the base model's vocabulary")
    return token


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """What may stand in no text that people wrote: it would be read as the end of a turn, or of everything."""
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    return re.compile("|".join(re.escape(token) for token in sorted(special_tokens(tokenizer))) or r"(?!)")


def render(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[tuple[str, list[Span]]]:
    """Each conversation's text, and where in it the answers with their end-of-turn tokens stand."""
    texts, spans = render_jinja_template(
        list(conversations), chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    return list(zip(texts, spans, strict=True))


def encode(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(list(strings), add_special_tokens=False)]


def tokenize(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[dict[str, list[int]]]:
    """{input_ids, labels} of whole conversations; labels are IGNORED outside answers and their end-of-turn tokens."""
    pieces, counts = [], []
    for text, spans in render(tokenizer, conversations):
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
    """{prompt_ids, chosen_ids, rejected_ids}; both answers end with the end-of-turn token."""
    pieces = []
    for (text, spans), (other, other_spans) in zip(
        render(tokenizer, [[*prompt, chosen] for prompt, chosen, _ in pairs]),
        render(tokenizer, [[*prompt, rejected] for prompt, _, rejected in pairs]),
        strict=True,
    ):
        (begin, end), (other_begin, other_end) = spans[-1], other_spans[-1]
        assert text[:begin] == other[:other_begin], f"the template lets an answer change its prompt: {text[:begin]!r} is not {other[:other_begin]!r}"
        pieces += [text[:begin], text[begin:end], other[other_begin:other_end]]
    encoded = encode(tokenizer, pieces)
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(encoded[0::3], encoded[1::3], encoded[2::3], strict=True)
    ]
