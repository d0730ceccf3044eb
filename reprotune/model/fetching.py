"""Fetch the base model at its pinned source: safetensors, config, tokenizer. GGUF is converted once."""

import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from reprotune import params
from reprotune.compat.gguf import forget_quantization, parsing_once, split_digits_first
from reprotune.data.sources import fetched
from reprotune.errors import InputError, first_line
from reprotune.records import filling, read_json

MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model",
)  # fmt: skip
REQUIRED = ("config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json")


def run(model: params.Model, out: Path) -> None:
    with fetched(model.source) as path, filling(out) as folder:
        if path.suffix == ".gguf":
            convert_gguf(path, folder)
        else:
            copy_checkpoint(path, folder)
        check(folder, source=path)


def copy_checkpoint(folder: Path, out: Path) -> None:
    for pattern in MODEL_FILES:
        for file in sorted(folder.glob(pattern)):
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


def check(out: Path, source: Path) -> None:
    """Raise InputError for a folder that no later stage could load."""
    for pattern in REQUIRED:
        if not list(out.glob(pattern)):
            names = sorted(file.name for file in out.iterdir())
            raise InputError(
                f"{source}: no {pattern} among {names}; "
                "model.source must hold a safetensors or GGUF checkpoint with its tokenizer"
            )
    tensors = {file.name: tensor_names(file, source) for file in sorted(out.glob("*.safetensors"))}
    for index in out.glob("*.safetensors.index.json"):
        for tensor, name in read_json(index)["weight_map"].items():
            if tensor not in tensors.get(name, ()):
                raise InputError(
                    f"{source}: {index.name} says that {tensor} is in {name}, which is not there or lacks it"
                    "; correct the files of model.source"
                )


def tensor_names(file: Path, source: Path) -> set[str]:
    try:
        with safe_open(file, "pt") as content:
            return set(content.keys())
    except SafetensorError as error:
        raise InputError(
            f"{source}: {file.name} is not a whole safetensors file ({first_line(error)}); "
            "correct model.source"
        ) from error
