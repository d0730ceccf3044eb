"""What the stages behind `fetch_model` need of a base, checked by its files without loading its weights."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from reprotune.data import vocabulary
from reprotune.errors import InputError, first_line
from reprotune.model import decoding
from reprotune.records import read_json

REQUIRED = ("config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json")
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Types of weights that are not quantized, as safetensors names them."""
WEIGHTS = ("weight", "weight_packed")
"""Ends of names of weights. Other tensors, as masks, may be whole numbers."""
SUPPORTED = (
    "expected weights in float32, bfloat16 or float16, which `model.quantization: nf4` quantizes as they are "
    "loaded, or a GGUF file, which is dequantized once; "
    "put the model that this one was quantized from into model.source"
)


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def check(folder: Path, source: Path) -> None:
    """Refuse a folder that no later stage could load or compute with.

    Raises:
        InputError: files are missing or damaged, the weights are quantized already, transformers knows no
        such model, it has no embedding for a token, or its generation settings cannot be read.
    """
    for pattern in REQUIRED:
        if not list(folder.glob(pattern)):
            names = sorted(file.name for file in folder.iterdir())
            raise InputError(
                f"{source}: no {pattern} among {names}; "
                "model.source must hold a safetensors or GGUF checkpoint with its tokenizer"
            )
    tensors = {file.name: tensors_of(file, source) for file in sorted(folder.glob("*.safetensors"))}
    for index in folder.glob("*.safetensors.index.json"):
        for tensor, name in read_json(index)["weight_map"].items():
            if tensor not in tensors.get(name, ()):
                raise InputError(
                    f"{source}: {index.name} says that {tensor} is in {name}, which is not there or lacks it"
                    "; correct the files of model.source"
                )
    whole = {name: tensor for in_file in tensors.values() for name, tensor in in_file.items()}
    check_not_quantized(folder, whole, source)
    decoding.of_base(folder, source)
    check_embeddings(folder, whole, source)


def tensors_of(file: Path, source: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by its header."""
    try:
        with safe_open(file, "pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
            return {name: Tensor(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise InputError(
            f"{source}: {file.name} is not a whole safetensors file ({first_line(error)}); "
            "correct model.source"
        ) from error


def check_not_quantized(folder: Path, tensors: dict[str, Tensor], source: Path) -> None:
    """Refuse GPTQ, AWQ, FP8, bitsandbytes and others, by the config and by the weights themselves."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if found := part.get(key):
                method = found.get("quant_method", "")
                raise InputError(
                    f"{source}: config.json: found a {key} {method!r}: these weights are quantized already; "
                    f"{SUPPORTED}"
                )
    for name, tensor in tensors.items():
        if name.endswith(WEIGHTS) and tensor.dtype not in FLOATS:
            raise InputError(
                f"{source}: found {name} in {tensor.dtype}: these weights are quantized already; {SUPPORTED}"
            )


def check_embeddings(folder: Path, tensors: dict[str, Tensor], source: Path) -> None:
    """Check that config, weights and tokenizer agree about the vocabulary."""
    model = without_weights(folder, source)
    embedding = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    (name,) = (name for name, module in model.named_modules() if module is embedding)
    last = f"{name.rpartition('.')[2]}.weight"
    for tensor in (tensor for key, tensor in tensors.items() if f".{key}".endswith(f".{last}")):
        if tensor.shape[0] != rows:
            raise InputError(
                f"{source}: config.json: vocab_size: found {rows:,}, expected the "
                f"{tensor.shape[0]:,} rows of the weights' {last}; correct the files of model.source"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{source}: no tokenizer could be loaded ({first_line(error)}); correct the files of model.source"
        ) from error
    vocabulary.check_tokenizer(tokenizer, rows, source)


def without_weights(folder: Path, source: Path) -> PreTrainedModel:
    """The model of config.json on torch's meta device."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise InputError(
            f"{source}: config.json: not a causal language model that the installed transformers knows "
            f"({first_line(error)}); correct model.source"
        ) from error
