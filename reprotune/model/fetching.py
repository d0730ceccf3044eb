"""Fetch the base model at its pinned source: safetensors, config, tokenizer. GGUF is converted once."""

import shutil
from pathlib import Path

from reprotune import params
from reprotune.compat.gguf import forget_quantization, parsing_once, split_digits_first
from reprotune.data.sources import fetched
from reprotune.errors import InputError, first_line
from reprotune.model import base_checks, origin, own_template
from reprotune.records import filling

MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def run(model: params.Model, out: Path) -> None:
    with fetched(model.source) as path, filling(out) as folder:
        if path.suffix == ".gguf":
            convert_gguf(path, folder)
        else:
            copy_checkpoint(path, folder)
        base_checks.check(folder, source=path)
        origin.write(model.source, folder)
        own_template.write(folder)


def copy_checkpoint(folder: Path, out: Path) -> None:
    for pattern in MODEL_FILES:
        # hidden files are no part of a source
        for file in sorted(folder.glob(pattern)):
            if file.name.startswith("."):
                continue
            shutil.copyfile(file, out / file.name)


def convert_gguf(path: Path, out: Path) -> None:
    """Dequantize to bfloat16, in which the model was trained; rounding to it is far finer than 4 bits.

    Raises:
        InputError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {path.name} to safetensors", flush=True)
    with parsing_once():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            )
        except Exception as error:
            raise InputError(
                f"{path.name}: not a GGUF file that transformers can read ({first_line(error)}); "
                "correct model.source"
            ) from error
        forget_quantization(model)
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        split_digits_first(tokenizer, str(path))
    tokenizer.save_pretrained(out)
