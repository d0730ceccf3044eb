"""From a source's own rows to conversations, and from conversations to tokens and labels.

A conversation is a list of {role, content} turns. Every assistant turn is trained on, its end-of-turn token included,
and nothing else: prompt and answer are tokenized apart, so the tokens before an answer are those that the model sees
when it is asked to write one.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages import InputError

Turn = dict[str, str]
Conversation = list[Turn]

IGNORED = -100
"""The label of a token that is not trained on, as torch's cross entropy takes it."""


def alpaca(row: dict[str, Any]) -> Conversation:
    """{instruction, input, output}; the input, where there is one, follows the instruction after an empty line."""
    prompt = text(row, "instruction")
    if row.get("input"):
        prompt = f"{prompt}\n\n{text(row, 'input')}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text(row, "output")}]


def sharegpt(row: dict[str, Any]) -> tuple[Conversation, Turn, Turn]:
    """{conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}}: prompt, chosen, rejected."""
    return [sharegpt_turn(turn) for turn in row["conversations"]], sharegpt_turn(row["chosen"]), sharegpt_turn(row["rejected"])


def sharegpt_turn(turn: dict[str, Any]) -> Turn:
    roles = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    if turn.get("from") not in roles:
        raise ValueError(f"`from` is {turn.get('from')!r}, expected one of {sorted(roles)}")
    return {"role": roles[turn["from"]], "content": text(turn, "value")}


def ultrafeedback(row: dict[str, Any]) -> tuple[Conversation, Turn, Turn]:
    """{chosen: [{role, content}], rejected: [{role, content}]}, two conversations that differ in their last turn."""
    chosen, rejected = ([{"role": text(turn, "role"), "content": text(turn, "content")} for turn in row[key]] for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("`chosen` and `rejected` differ before their last turn, expected one prompt")
    return chosen[:-1], chosen[-1], rejected[-1]


SFT_FORMATS: dict[str, Callable[[dict[str, Any]], Conversation]] = {"alpaca": alpaca}
PREFERENCE_FORMATS: dict[str, Callable[[dict[str, Any]], tuple[Conversation, Turn, Turn]]] = {
    "sharegpt": sharegpt,
    "ultrafeedback": ultrafeedback,
}


class EmptyText(ValueError):
    """A text without content. Published data sets have some (28 rows of Alpaca), so the row is dropped and counted."""


def text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"`{key}` is {value!r}, expected a text")
    if not value.strip():
        raise EmptyText(key)
    return value


def conversations(rows: list[dict[str, Any]], convert: Callable, file: Path) -> Iterator[Any]:
    """Convert rows of one source file, an empty one to None; one without the format's shape is an error with its number."""
    for number, row in enumerate(rows):
        try:
            yield convert(row)
        except EmptyText:
            yield None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            found = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{file}, row {number}: {found}; keys are {sorted(row)}; correct the source, or `format` in params.yaml ({convert.__name__})"
            ) from error


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
    ends = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token]
    tokenizer.eos_token = end_of_turn(tokenizer, template)
    spare = [token for token in ends if token not in (None, tokenizer.eos_token)]
    if not spare:
        raise InputError(f"{base}: no token is left for padding: pad, eos and unk are {ends}; one must differ from end of turn")
    tokenizer.pad_token = spare[0]
    tokenizer.padding_side = "right"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id, (tokenizer.pad_token, tokenizer.eos_token)
    return tokenizer


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: Path) -> str:
    """The token that the template writes behind an assistant's answer."""
    answer = "x"
    rendered = render(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}])
    prompt = render(tokenizer, [{"role": "user", "content": "x"}], add_generation_prompt=True)
    token = rendered.removeprefix(prompt).removeprefix(answer).strip()
    if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id) or len(tokenizer.encode(token, add_special_tokens=False)) != 1:
        raise InputError(f"{template}: an answer ends with {token!r}, expected one token of the base model's vocabulary")
    return token


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)


def encode(tokenizer: PreTrainedTokenizerBase, string: str) -> list[int]:
    return tokenizer.encode(string, add_special_tokens=False)


def tokenize(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Token ids and labels of a whole conversation; labels are IGNORED outside answers and their end-of-turn token."""
    ids, labels, done = [], [], ""
    for index, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        prompt = render(tokenizer, conversation[:index], add_generation_prompt=True)
        answer = turn["content"] + tokenizer.eos_token
        assert prompt.startswith(done), f"the template rewrites earlier turns: {prompt!r} does not continue {done!r}"
        prompt_ids, answer_ids = encode(tokenizer, prompt[len(done) :]), encode(tokenizer, answer)
        ids += prompt_ids + answer_ids
        labels += [IGNORED] * len(prompt_ids) + answer_ids
        done = prompt + answer
    return ids, labels


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, prompt: Conversation, chosen: Turn, rejected: Turn) -> dict[str, list[int]]:
    """{prompt_ids, chosen_ids, rejected_ids}; both answers end with the end-of-turn token."""
    return {
        "prompt_ids": encode(tokenizer, render(tokenizer, prompt, add_generation_prompt=True)),
        "chosen_ids": encode(tokenizer, chosen["content"] + tokenizer.eos_token),
        "rejected_ids": encode(tokenizer, rejected["content"] + tokenizer.eos_token),
    }
