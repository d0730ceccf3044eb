"""Small tokenizers of the kinds that base models have, made here and saved as a model's folder has them."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from tests.tiny import WORDS

TEXT = [" ".join(WORDS), *WORDS, "what the user says", "Below is an instruction: ### Response:\n"]
SPACES = {
    "first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "always": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "never": pre_tokenizers.Metaspace(prepend_scheme="never"),
}
"""By name, how a tokenizer of SentencePiece's kind puts a space before a text."""


def sentencepiece(folder: Path, spaces: str, special: tuple[str, ...], bos: bool = False) -> Path:
    """BPE with byte fallback, as Llama's and Gemma's.

    Args:
        spaces: a key of SPACES, or `legacy` for the normalizer of Llama's first versions.
        bos: whether the tokenizer begins each text with `<s>`.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    trained.train_from_iterator(TEXT, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if spaces == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = SPACES[spaces]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return saved(folder, tokenizer, special, bos, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bytelevel(folder: Path, special: tuple[str, ...] = (), bos: bool = False, **named: str) -> Path:
    """Byte-level BPE, as GPT-2's, Llama 3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(dict.fromkeys(named.values()))
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return saved(folder, tokenizer, special, bos, **named)


def saved(folder: Path, tokenizer: Tokenizer, special: tuple[str, ...], bos: bool, **named: str) -> Path:
    tokenizer.add_special_tokens([*dict.fromkeys(named.values()), *special])
    if bos:
        begin = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    Qwen3Config(vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder)
    return folder
