"""Fetch the base model at its pinned source into `models/base`: safetensors, config, tokenizer, nothing else.

A GGUF file is converted once to safetensors. transformers has no entry for SmolLM2's pre-tokenizer and falls back to
GPT-2's splitting, which tokenizes numbers differently from the model's own tokenizer: `digits_first` puts it right.
"""

import argparse
import shutil
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stages import InputError, command, first_line, params
from stages.records import filling, read_json
from stages.sources import fetched

MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


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
    """Dequantize to bfloat16, the type that the model was trained in; its rounding is far below that of 4 bits."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers parses the file anew for the config, the weights and the tokenizer, and each takes seconds
    gguf.GGUFReader = cache(gguf.GGUFReader)
    print(f"converting {path.name} to safetensors", flush=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:
        raise InputError(f"{path.name}: not a GGUF file that transformers can read ({first_line(error)}); correct model.source") from error
    # save_pretrained refuses a model that still says it is GGUF-quantized, which it no longer is
    del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    field = gguf.GGUFReader(str(path)).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        digits_first(tokenizer)
    tokenizer.save_pretrained(out)


def digits_first(tokenizer) -> None:
    """Split digits one by one, then byte-level: the pre-tokenizer that SmolLM2 was trained with."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def check(out: Path, source: Path) -> None:
    """Fail on a folder that no later stage could load."""
    for pattern in ("config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not list(out.glob(pattern)):
            found = sorted(file.name for file in out.iterdir())
            raise InputError(f"{source}: no {pattern} among {found}; model.source must hold a safetensors or GGUF checkpoint with its tokenizer")
    tensors: dict[str, set[str]] = {}
    for file in sorted(out.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as content:
                tensors[file.name] = set(content.keys())
        except SafetensorError as error:
            raise InputError(f"{source}: {file.name} is not a whole safetensors file ({first_line(error)}); correct model.source") from error
    for index in out.glob("*.safetensors.index.json"):
        for tensor, name in read_json(index)["weight_map"].items():
            if tensor not in tensors.get(name, ()):
                raise InputError(f"{source}: {index.name} says that {tensor} is in {name}, which is not there or lacks it; correct the files of model.source")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run(params.load().model, arguments.out)


if __name__ == "__main__":
    command(main)
