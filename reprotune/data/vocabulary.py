"""Whether the base model has an embedding for each token that its tokenizer and a run's template give."""

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from reprotune.data.rendering import ANSWER, SYSTEM, USER
from reprotune.errors import InputError

ROLES = ("bos_token", "eos_token", "unk_token")
"""Special tokens that are written though no text holds them. For padding, `load_tokenizer` finds one."""
RESIZE = "take the weights that belong to this tokenizer, whose embeddings were resized for it"


def embeddings(base: Path) -> int:
    """How many tokens have one, the first ones."""
    return AutoConfig.from_pretrained(base, local_files_only=True).get_text_config().vocab_size


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, base: object) -> None:
    """Refuse a tokenizer that gives a token without an embedding.

    Other special tokens may be without one, as an image's in a model of text alone, or one for padding that
    was added later: no row may hold them.

    Raises:
        InputError: a token that a text can hold has none, or the special token of a role.
    """
    special = special_tokens(tokenizer)
    vocabulary = tokenizer.get_vocab().keys()
    reachable = (vocabulary - special) | (vocabulary & of_roles(tokenizer))
    check(tokenizer, reachable, rows, f"{base}: its tokenizer", RESIZE)


def check_template(tokenizer: PreTrainedTokenizerBase, base: Path, template: Path) -> None:
    """Refuse a chat template that writes a token without an embedding.

    Args:
        tokenizer: with this template, and the end of its turns as eos.

    Raises:
        InputError: it does.
    """
    rows = embeddings(base)
    unknown = {token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if unknown:
        texts = [tokenizer.chat_template, *rendered(tokenizer)]
        written = {token for token in unknown if any(token in text for text in texts)}
        written |= unknown & {tokenizer.pad_token, *of_roles(tokenizer)}
        check(tokenizer, written, rows, str(template), f"use another template; or {RESIZE}")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def of_roles(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token for role in ROLES if (token := getattr(tokenizer, role)) is not None}


def rendered(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    """Conversations through the template."""
    for turns in ([SYSTEM, USER, ANSWER], [USER, ANSWER]):
        try:
            yield tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:
            # it refuses system turns, in whatever way
            continue


def check(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str], rows: int, where: str, advice: str
) -> None:
    numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    beyond = sorted((number, token) for token, number in numbers.items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        raise InputError(
            f"{where}: found {token!r}, token number {number:,} ({len(beyond)} such), expected numbers below "
            f"{rows:,}, the base's vocab_size: it has no embedding for others; {advice}"
        )
