"""GGUF through transformers: parsed once, saved as a plain model, tokenized as the model was trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING
from unittest.mock import patch

import gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def parsing_once() -> Iterator[None]:
    """Parse a GGUF file once inside a `with` block.

    transformers parses it anew for the config, the weights and the tokenizer. Seen with transformers 5.23.0
    and gguf 0.19.0.
    """
    with patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)):
        yield


def forget_quantization(model: PreTrainedModel) -> None:
    """Have `save_pretrained` accept a model loaded from GGUF.

    Its weights are dequantized as they are loaded, but it still counts as quantized in a form that cannot be
    saved. Seen with transformers 5.23.0.
    """
    del model.config.quantization_config
    model.hf_quantizer = None


def split_digits_first(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give SmolLM2's tokenizer its own pre-tokenizer: digits one by one, then bytes.

    A GGUF file names it `smollm` (https://github.com/ggml-org/llama.cpp/pull/8609). transformers does not
    know that name and falls back to GPT-2's pre-tokenizer, which splits numbers differently. Seen with
    transformers 5.23.0.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = gguf.GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
