"""How tokenizing differs between instruction rows and preference pairs."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from reprotune.data.accounting import Reason
from reprotune.data.chat_tokens import IGNORED, ChatTokens, Tokens
from reprotune.data.conversations import (
    Conversation,
    conversation_said,
    conversation_texts,
    first_prompt,
    pair_prompt,
    pair_said,
    pair_texts,
)
from reprotune.data.formats import to_conversation, to_pair
from reprotune.data.raw_rows import Row

LABELS = "labels"
"""The only column that holds no tokens."""


class LeftOut(NamedTuple):
    reason: Reason
    detail: str


def fit_example(row: Tokens, max_length: int, overlong: str) -> Tokens | LeftOut:
    """The example in at most `max_length` tokens: as it is, truncated, or left out."""
    length = len(row["input_ids"])
    if all(label == IGNORED for label in row[LABELS]):
        return LeftOut(Reason.WITHOUT_LABELS, "no turn of it is trained on")
    if length <= max_length:
        return row
    if overlong != "truncate":
        return LeftOut(Reason.OVERLONG, f"{length} tokens, max_length is {max_length}")
    row = {column: values[:max_length] for column, values in row.items()}
    if all(label == IGNORED for label in row[LABELS]):
        return LeftOut(Reason.WITHOUT_LABELS, f"no answer within the first {max_length} of {length} tokens")
    return row


def fit_pair(row: Tokens, max_length: int, overlong: str) -> Tokens | LeftOut:
    """The pair with prompt and longer completion in `max_length` tokens; truncates only completions."""
    prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
    length = len(prompt) + max(len(chosen), len(rejected))
    if length > max_length:
        if overlong != "truncate":
            return LeftOut(Reason.OVERLONG, f"{length} tokens, max_length is {max_length}")
        if len(prompt) >= max_length:
            return LeftOut(
                Reason.WITHOUT_LABELS,
                f"no answer within max_length, {max_length} tokens: the prompt has {len(prompt)}",
            )
        room = max_length - len(prompt)
        row = row | {"chosen_ids": chosen[:room], "rejected_ids": rejected[:room]}
    if row["chosen_ids"] == row["rejected_ids"]:
        return LeftOut(Reason.NO_PREFERENCE, "chosen and rejected have the same tokens")
    return row


def example_labels(row: Tokens) -> int:
    return sum(label != IGNORED for label in row[LABELS])


def pair_labels(row: Tokens) -> int:
    return len(row["chosen_ids"]) + len(row["rejected_ids"])


@dataclass(frozen=True)
class Kind:
    name: str
    """Its section of params.tokenize."""
    data: str
    """Its section of params.data."""
    columns: tuple[str, ...]
    convert: Callable[[Row, str, Collection[str]], Any]
    """A row of a named format to what `texts` and `tokenize` take, without some fields; raises InvalidRow."""
    texts: Callable[[Any], list[str]]
    identity: Callable[[Any], list[str]]
    """What rows have in common if one repeats the other."""
    said: Callable[[Any], list[str]]
    """What rows have nearly in common if one nearly repeats the other."""
    prompt: Callable[[Any], Conversation]
    """What rows have in common if one of them shows what another is tested on."""
    tokenize: Callable[[ChatTokens, list[Any]], list[Tokens]]
    """From converted rows; raises InvalidRow."""
    fit: Callable[[Tokens, int, str], Tokens | LeftOut]
    """From a tokenized row, max_length and overlong."""
    labels: Callable[[Tokens], int]
    """How many tokens are trained on."""
    measures_fill: bool
    """Whether metrics say how full a shard's rows are: examples can share a row, pairs cannot."""

    @property
    def token_columns(self) -> tuple[str, ...]:
        return tuple(column for column in self.columns if column != LABELS)


EXAMPLES = Kind(
    name="sft",
    data="sft",
    columns=("input_ids", LABELS),
    convert=to_conversation,
    texts=conversation_texts,
    identity=Conversation.identity,
    said=conversation_said,
    prompt=first_prompt,
    tokenize=ChatTokens.conversations,
    fit=fit_example,
    labels=example_labels,
    measures_fill=True,
)
PAIRS = Kind(
    name="dpo",
    data="preferences",
    columns=("prompt_ids", "chosen_ids", "rejected_ids"),
    convert=to_pair,
    texts=pair_texts,
    identity=pair_texts,
    said=pair_said,
    prompt=pair_prompt,
    tokenize=ChatTokens.pairs,
    fit=fit_pair,
    labels=pair_labels,
    measures_fill=False,
)
