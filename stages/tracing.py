"""What one micro-batch through a model computes and holds, found on tensors without content: no weights are read and no GPU is needed.

The model is the real one, its adapter PEFT's and its head TRL's; torch runs them by shapes alone. All repeating units of layers cost the same, so a
model of one unit and one of two tell what each further unit adds.
"""

import copy
import weakref
from dataclasses import astuple, dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from stages.attention import BY_SEGMENT, Segment
from stages.modeling import Policy, adapter_config, bare
from stages.params import Lora, Model

aten = torch.ops.aten
MATRICES = flop_registry | {
    # the part of the head's backward pass that adds into its result
    aten.addmm_: shape_wrapper(lambda into, one, other, **_: 2 * one[0] * one[1] * other[1]),
}
"""FLOPs by operation."""
ATTENTION = {
    # eager attention's products; no other part of a model has such
    aten.bmm: flop_registry[aten.bmm],
    # torch counts that of GPUs alone
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)),
}


@dataclass(frozen=True)
class Shape:
    """A micro-batch."""

    rows: int
    length: int
    labelled: int
    """Tokens that the head scores."""
    segments: tuple[Segment, ...] = ()
    """Of a row, where it is not one text."""
    texts: int = 1
    """In a row, each with its branches."""


@dataclass(frozen=True)
class Cost:
    """Of a micro-batch; gradients and optimizer are not in it."""

    forward: float
    """Bytes at most, beside the weights and their gradients, in the forward pass through the layers, in the head's two and in the layers' backward pass."""
    head: float
    backward: float
    matrices: float
    """FLOPs that grow with the tokens."""
    attention: float
    """FLOPs that grow with the tokens and the length."""
    operations: float
    """Kernels that are started, one after the other."""

    @property
    def peak(self) -> float:
        return max(self.forward, self.head, self.backward)


def policy(config: PreTrainedConfig, model: Model, lora: Lora) -> Policy:
    """What `modeling.new_policy` loads, without storage and not quantized: on torch's meta device."""
    whole = lora.method == "full"
    dtype = torch.float32 if whole else getattr(torch, model.dtype)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager" if model.attention == "eager" else BY_SEGMENT)
        return base if whole else get_peft_model(base, adapter_config(lora))


def cost(config: PreTrainedConfig, model: Model, lora: Lora, shape: Shape, backward: bool, checkpointing: bool) -> Cost:
    """Of a forward pass, and with `backward` of a training step's both, for the whole depth of the model."""
    unit, layers = repeating(config), config.get_text_config().num_hidden_layers
    if layers <= 2 * unit:
        return traced(config, model, lora, shape, backward, checkpointing)
    one, two = (astuple(traced(cut(config, count), model, lora, shape, backward, checkpointing)) for count in (unit, 2 * unit))
    return Cost(*(first + (second - first) * (layers - unit) / unit for first, second in zip(one, two, strict=True)))


def repeating(config: PreTrainedConfig) -> int:
    """Layers after which their kinds repeat."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    return next(unit for unit in range(1, len(kinds) + 1) if all(kind == kinds[index % unit] for index, kind in enumerate(kinds)))


def cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same architecture with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def traced(config: PreTrainedConfig, model: Model, lora: Lora, shape: Shape, backward: bool, checkpointing: bool) -> Cost:
    """Of all layers of `config`, one by one."""
    whole = policy(config, model, lora)
    with FakeTensorMode():
        fill(whole)
        return watched(whole, model.dtype, shape, backward, checkpointing)


def watched(whole: Policy, dtype: str, shape: Shape, backward: bool, checkpointing: bool) -> Cost:
    """Run a micro-batch of zeros through the policy, whether its tensors have a content or not."""
    base = bare(whole)
    whole.train(backward)
    if backward and checkpointing:
        # the state of the random numbers, kept for dropout, has a content and so cannot be traced
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for parameter in whole.parameters():
        if backward and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(shape.rows, shape.length, dtype=torch.long), "use_cache": False}
    if base.config._attn_implementation == BY_SEGMENT:
        # positions have no content here that segments could be found by
        inputs["position_ids"] = torch.zeros(1, shape.length, dtype=torch.long)
        inputs["position_ids"].segments = shape.segments or [Segment(shape.length, 0)]
    head = base.get_output_embeddings()
    known = [*whole.parameters(), *whole.buffers(), *(parameter.grad for parameter in whole.parameters() if parameter.grad is not None)]
    with Watched(known) as alive, torch.set_grad_enabled(backward):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = base.base_model(**inputs).last_hidden_state
            forward = alive.most()
            scored = hidden.detach().requires_grad_(backward)
            labels = torch.zeros(shape.labelled, dtype=torch.long)
            log_probs = ChunkedLogProbFunction.apply(
                scored.flatten(0, 1)[: shape.labelled], head.weight, head.bias, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
            )[0]
        if backward:
            log_probs.sum().backward()
        in_head = alive.most()
        if backward:
            hidden.backward(scored.grad)
        in_backward = alive.most()
    return Cost(forward, in_head, in_backward, alive.matrices, alive.attention, alive.operations)


def counts(whole: Policy) -> dict[str, int]:
    """Numbers of weights: frozen ones, trained ones, those of frozen linear layers, which can be quantized (the head is not), and of the largest of these."""
    base = bare(whole)
    head = base.get_output_embeddings()
    linear = [module.weight.numel() for module in base.modules() if isinstance(module, torch.nn.Linear) and module is not head and not module.weight.requires_grad]
    trained = sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad)
    return {"frozen": sum(parameter.numel() for parameter in whole.parameters()) - trained, "trained": trained, "linear": sum(linear), "largest": max(linear, default=0)}


def fill(model: torch.nn.Module) -> None:
    """Put tensors on the CPU, of the mode that is on, where the model has its own on the meta device; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty
                held[name] = made[id(tensor)]


class Watched(TorchDispatchMode):
    """Counts the operations that make a tensor, their FLOPs, and the bytes of those tensors that are alive, `known` ones aside.

    torch's own counter of FLOPs also follows modules, and so keeps alive what checkpointing computes again.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now, self.peak, self.operations, self.matrices, self.attention = 0, 0, 0, 0, 0
        self.alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        makes = False
        for tensor in tree_leaves(found):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.finalize(storage, self.gone, key, size)
                self.now += size
                makes = True
        self.peak = max(self.peak, self.now)
        self.operations += makes
        operation = function._overloadpacket
        if operation in ATTENTION:
            self.attention += ATTENTION[operation](*args, **(kwargs or {}), out_val=found)
        elif operation in MATRICES:
            self.matrices += MATRICES[operation](*args, **(kwargs or {}), out_val=found)
        return found

    def most(self) -> int:
        """Bytes at most since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

    def gone(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]
