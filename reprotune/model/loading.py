"""Load the base model and what was trained on it, in the same way wherever a stage computes with them.

So what is scored is what was trained: the same quantization, dtype and attention.
"""

import math
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, set_seed

from reprotune.compat.bitsandbytes import keep_differentiable
from reprotune.errors import InputError, first_line
from reprotune.model.determinism import device
from reprotune.model.policies import Policy
from reprotune.model.saving import BASE_FILE, base_fingerprint
from reprotune.params import Lora, Model
from reprotune.records import read_json

DEQUANTIZED_SHARE = 0.5
"""Of a device's memory, what NF4 weights may take when they are dequantized once for scoring."""


def load_base(base: Path, model: Model, dequantized: bool = False) -> PreTrainedModel:
    """The base model in eval mode on this process's device, quantized as `model.quantization` says.

    Args:
        dequantized: keep quantized weights in model.dtype. They have the same values, and no forward pass has
            to dequantize them anew.

    Raises:
        InputError: a file of the model is missing or damaged, or its weights are not exactly the
        architecture's.
    """
    dtype = getattr(torch, model.dtype)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            quantization_config=nf4(dtype) if model.quantization == "nf4" else None,
            attn_implementation=model.attention,
            device_map={"": device()},
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise InputError(
            "params.yaml: model: a package that these settings need is not installed "
            f"({first_line(error)}); install it, or change the settings"
        ) from error
    except Exception as error:
        raise InputError(
            f"{base}: the model could not be loaded ({first_line(error)}); `dvc checkout {base}` restores it"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(map(str, report[problem]))[:3]
            raise InputError(
                f"{base}: {problem.replace('_', ' ')}: {names}, expected exactly the weights of its "
                f"config.json; `dvc checkout {base}` restores it, or correct model.source"
            )
    loaded.config.use_cache = False
    keep_differentiable(loaded)
    if model.quantization == "nf4" and dequantized:
        loaded = loaded.dequantize(dtype)
    return loaded.eval()


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantization (https://arxiv.org/abs/2305.14314), computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def fits_dequantized(base: Path, model: Model) -> bool:
    """Whether all weights in model.dtype take at most DEQUANTIZED_SHARE of the device's memory.

    All of its memory counts, free or not, so that the answer is the same on every run.
    """
    weights = 0
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            # what safe_open gives is no mapping, and only its keys can be iterated over
            weights += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device()).total_memory
    else:
        memory = physical_memory()
    return weights * getattr(torch, model.dtype).itemsize <= DEQUANTIZED_SHARE * memory


def physical_memory() -> int:
    """Bytes of this machine, or of its container's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    file = Path("/sys/fs/cgroup/memory.max")
    limit = file.read_text().strip() if file.exists() else "max"
    return memory if limit == "max" else min(memory, int(limit))


def new_policy(base: Path, model: Model, lora: Lora, seed: int) -> Policy:
    """What SFT trains: a new adapter, which changes nothing yet (its B matrices are zero), or all weights.

    Raises:
        InputError: the base cannot be loaded, or lora.target_modules names no layer of it, or one that cannot
        have an adapter.
    """
    if lora.method == "full":
        return load_base(base, in_float32(model))
    loaded = load_base(base, model)
    check_targets(loaded, lora)
    set_seed(seed)
    try:
        return get_peft_model(loaded, adapter_config(lora))
    except ValueError as error:
        raise InputError(
            f"params.yaml: lora.target_modules: found {lora.target_modules!r}, expected linear layers or "
            f"embeddings ({first_line(error)})"
        ) from error


def check_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Refuse targets that name no layer, the LM head, or a layer that shares its weights with another one.

    Merging would change shared weights in both places, while the adapter computes in one.

    Raises:
        InputError: a target does.
    """
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    owners: dict[int, list[str]] = {}
    # a module that stands in two places of its parent's is adapted in both; in two parents it is not
    for parent, module in modules.items():
        for name, child in module.named_children():
            for parameter in child.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(f"{parent}.{name}".lstrip("."))
    shared = {name: sorted(others) for others in owners.values() if len(others) > 1 for name in others}
    if not isinstance(lora.target_modules, list):
        for name, others in shared.items():
            if isinstance(modules.get(name), torch.nn.Linear) and modules[name] is not head:
                raise InputError(
                    "params.yaml: lora.target_modules: found 'all-linear', expected a list of layers with "
                    f"weights of their own: {' and '.join(others)} share theirs, so merging would "
                    "change both"
                )
        return
    for target in lora.target_modules:
        found = f"params.yaml: lora.target_modules: found {target!r}"
        matched = [name for name in modules if name == target or name.endswith(f".{target}")]
        for name in matched:
            if modules[name] is head:
                raise InputError(
                    f"{found}, which is the LM head {name}, expected layers below it: log-probs are computed "
                    "from the LM head's own weights alone"
                )
            if name in shared:
                raise InputError(
                    f"{found}, expected layers with weights of their own: {' and '.join(shared[name])} share "
                    "theirs (tie_word_embeddings), so merging would change both"
                )
        if not matched:
            linear = {
                name.split(".")[-1] for name, module in modules.items() if isinstance(module, torch.nn.Linear)
            }
            raise InputError(f"{found}, expected the end of a layer's name, such as {sorted(linear)}")


def adapter_config(lora: Lora) -> LoraConfig:
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_dora=lora.method == "dora",
        task_type="CAUSAL_LM",
    )


def load_policy(
    base: Path, trained: Path, model: Model, trainable: bool = False, dequantized: bool = False
) -> Policy:
    """What a training stage left in `trained`: an adapter, which is put on the base, or all weights.

    Raises:
        InputError: it cannot be read, its weights are not exactly its config's, or it was trained on another
        base.
    """
    if (trained / "config.json").exists():
        return load_base(trained, in_float32(model) if trainable else model)
    loaded = load_base(base, model, dequantized)
    restore = f"`dvc checkout {trained}` restores it"
    try:
        policy = PeftModel.from_pretrained(
            loaded, str(trained), is_trainable=trainable, local_files_only=True
        )
        # PEFT looks there for the vocabulary's size; what is published may name a repository on the Hub
        policy.peft_config["default"].base_model_name_or_path = str(base)
        with safe_open(trained / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
    except Exception as error:
        raise InputError(
            f"{trained}: the adapter could not be loaded ({first_line(error)}); {restore}"
        ) from error
    if unmatched := sorted(stored ^ set(get_peft_model_state_dict(policy))):
        raise InputError(
            f"{trained}: {len(unmatched)} weights are missing or too many, such as {unmatched[0]}; {restore}"
        )
    trained_on, present = read_json(trained / BASE_FILE)["fingerprint"], base_fingerprint(base)
    if trained_on != present:
        raise InputError(
            f"{trained}: it was trained on the base {trained_on}, found {present} in {base}; "
            "`dvc repro` trains it anew, `dvc checkout` restores both"
        )
    return policy


def in_float32(model: Model) -> Model:
    """These settings with float32 weights: an update is often smaller than what bfloat16 can tell apart."""
    return model.model_copy(update={"dtype": "float32"})
