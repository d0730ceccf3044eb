"""The base model, adapters on it, and what training and scoring both compute with them.

The base is loaded the same way everywhere, quantized or not: what is scored is what was trained. Adapters are kept in
float32: TRL would round those on a quantized base to bfloat16, and the reference, the first DPO step and a resumed run
would then each see another model.
"""

import ctypes
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import xxhash

# bitsandbytes wraps four functions in torch.compile as it is imported. No kernel of NF4 is among them, but the compiler
# is loaded, which takes three seconds in each process.
with patch.object(torch, "compile", lambda function=None, **_: function or (lambda wrapped: wrapped)):
    from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from stages import InputError, first_line
from stages.params import Lora, Model
from stages.records import digest, filling, read_json, write_json

Policy = PreTrainedModel | PeftModel
"""A model that is trained: a base with an adapter on it, or all of its weights."""
LOGITS = 2**28
"""That scoring computes at once, at most; in float32 they take a GiB."""


def start(seed: int, warn_only: bool = False) -> None:
    """Same seed, same bytes: fix every generator, and have torch take kernels that repeat, or raise where it has none.

    Args:
        warn_only: warn instead of raising. For stages that compute no gradients, of which attention's on a GPU would then not repeat: a benchmark may sample, for which torch has no such kernel.
    """
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    set_seed(seed)
    torch.set_deterministic_debug_mode("warn" if warn_only else "error")
    # it would write into memory that is written anyway
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    # it would prepare itself for each length anew, for as long as all else in a step takes
    torch.backends.cuda.enable_cudnn_sdp(False)
    # read by transformers, of the package flash-attn, which torch does not know of
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")


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


def load_base(base: Path, model: Model, unpacked: bool = False) -> PreTrainedModel:
    """The base model in eval mode on this process's device, its linear weights in NF4 if `model.quantization` says so; `unpacked`, they have the same values and
    are kept in model.dtype, which is faster than unpacking them in each forward pass.

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
    for module in loaded.modules():
        if isinstance(module, Linear4bit):
            # where a CPU has AVX512-BF16, the first pass that measures would pack the weights for a kernel that rounds to bfloat16 and lets no gradient through
            module.support_avx512bf16_for_cpu = False
    if quantization is not None and unpacked:
        loaded = loaded.dequantize(dtype)
    return loaded.eval()


def fits_unpacked(base: Path, model: Model) -> bool:
    """Whether all weights in model.dtype take at most half of the device's memory: of the whole, so that the answer does not change from run to run."""
    weights = 0
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            weights += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    memory = torch.cuda.get_device_properties(device()).total_memory if torch.cuda.is_available() else physical_memory()
    return weights * getattr(torch, model.dtype).itemsize <= memory / 2


def physical_memory() -> float:
    """Of this machine, or what a container is given of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text().strip() if limit.exists() else "max"
    return found if given == "max" else min(found, int(given))


def new_policy(base: Path, model: Model, lora: Lora, seed: int) -> Policy:
    """What SFT trains: an adapter that changes nothing yet, for its B matrices are zero, or all weights, kept in float32.

    Raises:
        InputError: the base cannot be loaded, or lora.target_modules names no layer of it.
    """
    if lora.method == "full":
        return load_base(base, in_float32(model))
    loaded = load_base(base, model)
    if isinstance(lora.target_modules, list):
        names = [name for name, _ in loaded.named_modules()]
        for target in lora.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                known = sorted({name.split(".")[-1] for name, module in loaded.named_modules() if isinstance(module, torch.nn.Linear)})
                raise InputError(f"params.yaml: lora.target_modules: found {target!r}, expected the end of a layer's name, such as {known}")
    set_seed(seed)
    return get_peft_model(loaded, adapter_config(lora))


def adapter_config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_dora=lora.method == "dora",
        task_type="CAUSAL_LM",
    )


def load_policy(base: Path, trained: Path, model: Model, trainable: bool = False, unpacked: bool = False) -> Policy:
    """What a training stage left in `trained`: an adapter, which is put on the base model, or all weights.

    Raises:
        InputError: it cannot be read, does not have exactly the weights that its config asks for, or was trained on another base.
    """
    if (trained / "config.json").exists():
        return load_base(trained, in_float32(model) if trainable else model)
    loaded = load_base(base, model, unpacked)
    restore = f"`dvc checkout {trained}` restores it"
    try:
        policy = PeftModel.from_pretrained(loaded, str(trained), is_trainable=trainable, local_files_only=True)
        with safe_open(trained / "adapter_model.safetensors", "pt") as file:
            found = set(file.keys())
    except Exception as error:
        raise InputError(f"{trained}: the adapter could not be loaded ({first_line(error)}); {restore}") from error
    odd = sorted(found ^ set(get_peft_model_state_dict(policy)))
    if odd:
        raise InputError(f"{trained}: {len(odd)} weights are missing or too many, such as {odd[0]}; {restore}")
    if (own := read_json(trained / BASE)["fingerprint"]) != (here := fingerprint(base)):
        raise InputError(f"{trained}: it was trained on the base {own}, found {here} in {base}; `dvc repro` trains it anew, `dvc checkout` restores both")
    return policy


BASE = "base.json"
"""The file beside an adapter that says which base it belongs to."""


def fingerprint(base: Path) -> str:
    """Of the base's weights and config: 32 hex digits."""
    found = xxhash.xxh3_128()
    for file in [base / "config.json", *sorted(base.glob("*.safetensors"))]:
        found.update(f"{file.name} {digest(file)}\n".encode())
    return found.hexdigest()


def in_float32(model: Model) -> Model:
    """All weights are trained in float32, with model.dtype's arithmetic: updates are smaller than what bfloat16 can tell apart."""
    return model.model_copy(update={"dtype": "float32"})


def bare(policy: Policy) -> PreTrainedModel:
    """The model itself, below PEFT's wrapping."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def compute_in(policy: Policy, dtype: str) -> None:
    """Have the model compute in model.dtype, whatever runs it: with bfloat16, its float32 weights stay as they are and are rounded where they are used.

    DeepSpeed and accelerate have settings of their own for this, of which DeepSpeed's rounds the weights of an adapter.
    """
    model = bare(policy)
    forward = model.forward

    @wraps(forward)
    def computing(*given: Any, **named: Any) -> Any:
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return forward(*given, **named)

    model.forward = computing


@contextmanager
def measuring(policy: Policy) -> Iterator[None]:
    """No gradients, no dropout."""
    training = policy.training
    policy.eval()
    with torch.no_grad():
        yield
    policy.train(training)


@contextmanager
def adapter_dtype_kept(model: Policy) -> Iterator[None]:
    """Undo, on leaving, what a TRL trainer's constructor does to the adapter: a cast to bfloat16 on a quantized base."""
    adapter = model.named_parameters() if isinstance(model, PeftModel) else ()
    kept = {name: parameter.detach().clone() for name, parameter in adapter if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def save_policy(model: Policy, tokenizer: PreTrainedTokenizerBase, base: Path, dtype: str, out: Path) -> None:
    """Write the adapter, or all weights in `dtype`, with the tokenizer and a generation config that stops at the end of a turn.

    An adapter's `target_modules` is a set, whose order differs from process to process, so its config is written anew in order;
    the library's empty model card is not kept.
    """
    with filling(out) as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder, selected_adapters=["default"])
            (folder / "README.md").unlink(missing_ok=True)
            config = read_json(folder / "adapter_config.json")
            write_json(folder / "adapter_config.json", {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()})
            write_json(folder / BASE, {"fingerprint": fingerprint(base)})
        else:
            # tied weights stay tied: one tensor, one cast
            cast: dict[int, torch.Tensor] = {}
            weights = {name: cast.setdefault(tensor.data_ptr(), tensor.to(getattr(torch, dtype))) for name, tensor in model.state_dict().items()}
            model.config.dtype = getattr(torch, dtype)
            model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
