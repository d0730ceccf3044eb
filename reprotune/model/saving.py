"""Write a trained policy: the same weights give the same files, and an adapter names its base."""

from pathlib import Path

import torch
import xxhash
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reprotune.model.policies import Policy
from reprotune.records import digest, filling, read_json, write_json

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
    """Write the adapter, or all weights in `dtype`, with the tokenizer and a generation config.

    The generation config stops at the end of a turn.
    """
    with filling(out) as folder:
        if isinstance(policy, PeftModel):
            save_adapter(policy, base, folder)
        else:
            save_weights(policy, getattr(torch, dtype), folder)
        tokenizer.save_pretrained(folder)
        write_json(
            folder / "generation_config.json",
            {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        )


def save_adapter(policy: PeftModel, base: Path, folder: Path) -> None:
    """Write the adapter without PEFT's empty model card, and with sorted lists in its config.

    `target_modules` is a set, whose order differs from process to process.
    """
    policy.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)
    config = read_json(folder / "adapter_config.json")
    config = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    write_json(folder / "adapter_config.json", config)
    write_json(folder / BASE_FILE, {"fingerprint": base_fingerprint(base)})


def save_weights(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    # tied weights stay tied: one tensor, one cast
    cast: dict[int, torch.Tensor] = {}
    weights = {
        name: cast.setdefault(tensor.data_ptr(), tensor.to(dtype))
        for name, tensor in model.state_dict().items()
    }
    model.config.dtype = dtype
    model.save_pretrained(folder, state_dict=weights)
