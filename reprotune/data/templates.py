"""The run's chat template: loaded, checked, and made part of the base model's tokenizer.

The template marks what is trained on with `{% generation %}`: each assistant turn and its end-of-turn token.
"""

import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reprotune.data import published_template, vocabulary
from reprotune.data.conversations import Conversation
from reprotune.data.rendering import ANSWER, USER, asked, render
from reprotune.data.template_checks import end_of_turn
from reprotune.errors import InputError, first_line
from reprotune.params import Model

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
    others = sorted(
        vocabulary.special_tokens(tokenizer), key=lambda token: ("pad" not in token.lower(), token)
    )
    taken = {None, ended, tokenizer.bos_token, *written(tokenizer)}
    candidates = [token for token in (*named, *others) if token not in taken]
    nul = tokenizer.convert_ids_to_tokens(tokenizer.encode("\0", add_special_tokens=False))
    return candidates + (nul if len(nul) == 1 else [])


def lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template marks as part of an answer, and writes itself where it asks for one."""
    ((rendered, spans),) = render(tokenizer, [Conversation([USER, ANSWER])])
    return rendered[spans[0][0] : len(asked(tokenizer, [USER]))]


def written(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The added tokens that the template writes around what a conversation says."""
    ((text, spans),) = render(tokenizer, [Conversation([USER, ANSWER, USER, ANSWER])])
    begin, end = spans[0]
    around = text[:begin] + text[begin:end].partition(ANSWER["content"])[2] + text[end : spans[1][0]]
    return {token for token in map(str, tokenizer.added_tokens_decoder.values()) if token in around}


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches tokens that no row's text may hold: they would be read as the end of a turn or of all."""
    tokens = vocabulary.special_tokens(tokenizer) | written(tokenizer)
    return re.compile("|".join(re.escape(token) for token in sorted(tokens)) or r"(?!)")
