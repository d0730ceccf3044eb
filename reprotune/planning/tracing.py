"""What one micro-batch through a model computes and holds, traced by shapes alone: no weights, no GPU."""

import copy
from dataclasses import astuple, dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from reprotune.compat.transformers import attention_of
from reprotune.compat.trl import head_log_probs
from reprotune.model.attention import BY_SEGMENT, Segment
from reprotune.model.loading import adapter_config, check_targets
from reprotune.model.policies import Policy, bare
from reprotune.params import Lora, Model
from reprotune.planning.operations import Counter


@dataclass(frozen=True)
class Shape:
    """A micro-batch."""

    rows: int
    length: int
    """Tokens of a row."""
    labelled: int
    """Tokens that the LM head scores."""
    segments: tuple[Segment, ...] = ()
    """Of a row; none if it holds one sequence."""
    examples: int = 1
    """Of a row; an example is a sequence with its continuations."""


@dataclass(frozen=True)
class Cost:
    """Of a micro-batch, without gradients and optimizer."""

    forward: float
    """Peak bytes of the forward pass through the layers, apart from weights and their gradients."""
    head: float
    """Peak bytes of the LM head's forward and backward pass."""
    backward: float
    """Peak bytes of the layers' backward pass."""
    matrices: float
    """FLOPs that grow with the tokens."""
    attention: float
    """FLOPs that grow with the tokens and with what each attends to."""
    operations: float
    """Kernels that are launched."""

    @property
    def peak(self) -> float:
        return max(self.forward, self.head, self.backward)


def policy(config: PreTrainedConfig, model: Model, lora: Lora) -> Policy:
    """What `loading.new_policy` loads, on torch's meta device: without storage, and not quantized."""
    full = lora.method == "full"
    dtype = torch.float32 if full else getattr(torch, model.dtype)
    attention = "eager" if model.attention == "eager" else BY_SEGMENT
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if full:
            return base
        check_targets(base, lora)
        return get_peft_model(base, adapter_config(lora))


def counts(policy: Policy) -> dict[str, int]:
    """Numbers of weights.

    Returns:
        frozen; trained; linear, those of frozen linear layers other than the LM head, which can be quantized;
        and largest, those of the largest such layer.
    """
    base = bare(policy)
    head = base.get_output_embeddings()
    linear = [
        module.weight.numel()
        for module in base.modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not module.weight.requires_grad
    ]
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    return {
        "frozen": sum(parameter.numel() for parameter in policy.parameters()) - trained,
        "trained": trained,
        "linear": sum(linear),
        "largest": max(linear, default=0),
    }


def cost(
    config: PreTrainedConfig, model: Model, lora: Lora, shape: Shape, backward: bool, checkpointing: bool
) -> Cost:
    """The cost of a forward pass, and with `backward` of a training step.

    Layers repeat in units of equal cost: one unit and two tell what each further one adds.
    """
    unit, layers = repeating_unit(config), config.get_text_config().num_hidden_layers
    if layers <= 2 * unit:
        return traced(config, model, lora, shape, backward, checkpointing)
    of_one, of_two = (
        astuple(traced(shortened(config, depth), model, lora, shape, backward, checkpointing))
        for depth in (unit, 2 * unit)
    )
    return Cost(
        *(one + (two - one) * (layers - unit) / unit for one, two in zip(of_one, of_two, strict=True))
    )


def repeating_unit(config: PreTrainedConfig) -> int:
    """The number of layers after which their kinds repeat."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"]
    return next(
        unit
        for unit in range(1, len(kinds) + 1)
        if all(kind == kinds[index % unit] for index, kind in enumerate(kinds))
    )


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same architecture with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def traced(
    config: PreTrainedConfig, model: Model, lora: Lora, shape: Shape, backward: bool, checkpointing: bool
) -> Cost:
    """As `cost`, with every layer traced."""
    fake = policy(config, model, lora)
    with FakeTensorMode():
        materialize(fake)
        return watched(fake, model.dtype, shape, backward, checkpointing)


def materialize(model: torch.nn.Module) -> None:
    """Replace tensors on the meta device by CPU ones of the active mode; tied ones stay tied."""
    replaced: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    replaced[id(tensor)] = (
                        torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    )
                tensors[name] = replaced[id(tensor)]


def watched(policy: Policy, dtype: str, shape: Shape, backward: bool, checkpointing: bool) -> Cost:
    """The cost of one micro-batch of zeros, which the policy computes for real or on fake tensors."""
    base = bare(policy)
    policy.train(backward)
    if backward and checkpointing:
        # the state of the random number generator, kept for dropout, cannot be traced
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for parameter in policy.parameters():
        if backward and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    head, inputs = base.get_output_embeddings(), zeros(base, shape)
    gradients = (parameter.grad for parameter in policy.parameters() if parameter.grad is not None)
    known = [*policy.parameters(), *policy.buffers(), *gradients]
    with Counter(known) as counter, torch.set_grad_enabled(backward):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = base.base_model(**inputs).last_hidden_state
            in_forward = counter.peak_since()
            scored = hidden.detach().requires_grad_(backward)
            labels = torch.zeros(shape.labelled, dtype=torch.long)
            log_probs = head_log_probs(scored.flatten(0, 1)[: shape.labelled], head, labels)
        if backward:
            log_probs.sum().backward()
        in_head = counter.peak_since()
        if backward:
            hidden.backward(scored.grad)
        in_backward = counter.peak_since()
    return Cost(in_forward, in_head, in_backward, counter.matrices, counter.attention, counter.operations)


def zeros(base: torch.nn.Module, shape: Shape) -> dict[str, Any]:
    """A micro-batch of zeros as the model's inputs."""
    ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if attention_of(base.config) == BY_SEGMENT:
        positions = torch.zeros(1, shape.length, dtype=torch.long)
        # fake positions have no values to find segments by
        positions.segments = shape.segments or [Segment(shape.length, 0)]
        inputs["position_ids"] = positions
    return inputs
