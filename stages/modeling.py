"""The base model, adapters on it, and what training and scoring both compute with them.

The base is loaded the same way everywhere, quantized or not: what is scored is what was trained. Adapters are kept in
float32: TRL would round those on a quantized base to bfloat16, and the reference, the first DPO step and a resumed run
would then each see another model.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

# bitsandbytes wraps four functions in torch.compile as it is imported. No kernel of NF4 is among them, but the compiler
# is loaded, which takes three seconds in each process.
with patch.object(torch, "compile", lambda function=None, **_: function or (lambda wrapped: wrapped)):
    import bitsandbytes  # noqa: F401
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from stages import InputError, first_line
from stages.params import Lora, Model
from stages.records import filling, read_json, write_json


def start(seed: int) -> None:
    """Same seed, same bytes: fix every generator, and make torch choose kernels that repeat."""
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Have glibc hand freed memory out again instead of giving it back to the kernel after each large tensor.

    On a CPU every such tensor would otherwise be paged in anew: a third of a forward pass's time on a virtual machine.
    The constants are M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX of mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):
            libc.mallopt(option, value)


def device() -> torch.device:
    """This process's own GPU under a launcher, the first one otherwise, the CPU where there is none."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def load_base(base: Path, model: Model) -> PreTrainedModel:
    """The base model in eval mode on this process's device, its linear weights in NF4 if `model.quantization` says so.

    Raises:
        InputError: a file of the model is missing or damaged, or it does not have exactly the architecture's weights.
    """
    dtype = getattr(torch, model.dtype)
    quantization = None
    if model.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation=model.attention,
            device_map={"": device()},
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise InputError(f"params.yaml: model: a package that these settings need is not installed ({first_line(error)})") from error
    except Exception as error:
        raise InputError(f"{base}: the model could not be loaded ({first_line(error)}); `dvc checkout {base}` restores it") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise InputError(
                f"{base}: {what.replace('_', ' ')}: {sorted(map(str, report[what]))[:3]}, expected exactly the weights of its config.json; "
                f"`dvc checkout {base}` restores it, or correct model.source"
            )
    loaded.config.use_cache = False
    return loaded.eval()


def add_adapter(base: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """A new LoRA adapter that changes nothing yet: its B matrices are zero (https://arxiv.org/abs/2106.09685)."""
    set_seed(seed)
    if isinstance(lora.target_modules, list):
        names = [name for name, _ in base.named_modules()]
        for target in lora.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                known = sorted({name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)})
                raise InputError(f"params.yaml: lora.target_modules: found {target!r}, expected the end of a layer's name, such as {known}")
    return get_peft_model(
        base,
        LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, task_type="CAUSAL_LM"
        ),
    )


def load_adapter(base: PreTrainedModel, adapter: Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on the base model.

    Raises:
        InputError: it cannot be read, or does not have exactly the weights that its config asks for.
    """
    try:
        model = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable, local_files_only=True)
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            found = set(file.keys())
    except Exception as error:
        raise InputError(f"{adapter}: the adapter could not be loaded ({first_line(error)}); `dvc checkout {adapter}` restores it") from error
    odd = sorted(found ^ set(get_peft_model_state_dict(model)))
    if odd:
        raise InputError(f"{adapter}: {len(odd)} weights are missing or too many, such as {odd[0]}; `dvc checkout {adapter}` restores it")
    return model


@contextmanager
def adapter_dtype_kept(model: PeftModel) -> Iterator[None]:
    """Undo, on leaving, what a TRL trainer's constructor does to the adapter: a cast to bfloat16 on a quantized base."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the adapter, its tokenizer and a generation config that stops at the end of a turn.

    `target_modules` is a set, whose order differs from process to process, so the config is written anew in order; the
    library's empty model card is not kept.
    """
    with filling(out) as folder:
        model.save_pretrained(folder, selected_adapters=["default"])
        (folder / "README.md").unlink(missing_ok=True)
        config = read_json(folder / "adapter_config.json")
        write_json(folder / "adapter_config.json", {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()})
        tokenizer.save_pretrained(folder)
        write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
