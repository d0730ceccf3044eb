"""Write a trained policy: the same weights give the same files, and an adapter names its base."""

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reprotune.compat.transformers import config_for_4, tokenizer_config_for_4
from reprotune.data.published_template import without_marks
from reprotune.model import decoding, origin
from reprotune.model.policies import Policy
from reprotune.records import digest, filling, read_json, write_json, write_text

BASE_FILE = "base.json"
"""In an adapter's folder: the fingerprint of its base."""


def base_fingerprint(base: Path) -> str:
    """32 hex digits, from the weights and the config."""
    hasher = xxhash.xxh3_128()
    for file in [base / "config.json", *sorted(base.glob("*.safetensors"))]:
        hasher.update(f"{file.name} {digest(file)}\n".encode())
    return hasher.hexdigest()


def save_policy(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, base: Path, dtype: str, out: Path
) -> None:
    """Write the adapter, or all weights in `dtype`, with the tokenizer and the run's generation config."""
    with filling(out) as folder:
        if isinstance(policy, PeftModel):
            save_adapter(policy, base, folder)
        else:
            save_weights(policy, tokenizer, base, dtype, folder)
        save_tokenizer(tokenizer, folder)
        write_config(folder / "generation_config.json", decoding.content(decoding.of_run(base, tokenizer)))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer as other programs and older versions read it, with the template without marks."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    write_config(config, tokenizer_config_for_4(read_json(config)))
    write_text(folder / "chat_template.jinja", without_marks(tokenizer.chat_template))


def save_adapter(policy: PeftModel, base: Path, folder: Path) -> None:
    """Write the adapter without PEFT's empty model card, and with sorted lists in its config.

    `target_modules` is a set, whose order differs from process to process. A base from the Hub is named by
    its repository, so that the adapter loads elsewhere.
    """
    policy.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)
    config = read_json(folder / "adapter_config.json")
    config = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    write_json(folder / "adapter_config.json", config | origin.in_adapter_config(base))
    write_json(folder / BASE_FILE, {"fingerprint": base_fingerprint(base)})


def save_weights(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Path, dtype: str, folder: Path
) -> None:
    # tied weights stay tied: one tensor, one cast
    cast: dict[int, torch.Tensor] = {}
    weights = {
        name: cast.setdefault(
            tensor.data_ptr(), tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        )
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=weights)
    config = whole_config(read_json(folder / "config.json"), read_json(base / "config.json"))
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_config(folder / "config.json", config_for_4(in_dtype(config | tokens, dtype)))


def write_config(file: Path, config: dict[str, Any]) -> None:
    """Write a library's JSON file with every digit, where `write_json` rounds: models compute with them."""
    write_text(file, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def whole_config(written: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The base's config.json, completed by what transformers writes for the model as it was loaded.

    That one says what training needed: float32 weights, no cache. Of a base with more than text, the part for
    text is loaded.
    """
    own = base if base["model_type"] == written["model_type"] else base["text_config"]
    kind = {key: written[key] for key in ("architectures", "model_type")}
    return {key: value for key, value in written.items() if key != "use_cache"} | own | kind


def in_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config, and the configs in it, that says that weights are in `dtype`, under the old name as well."""
    return {
        key: in_dtype(value, dtype)
        if isinstance(value, dict)
        else dtype
        if key in ("dtype", "torch_dtype")
        else value
        for key, value in config.items()
    }
