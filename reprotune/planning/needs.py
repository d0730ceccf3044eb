"""The needs of sft, reference, dpo and evaluate: memory, work and time on given devices."""

import copy
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

from reprotune import params
from reprotune.compat.transformers import set_attention
from reprotune.model import loading
from reprotune.model.attention import can_attend_by_segment
from reprotune.planning import evaluate_need, tracing
from reprotune.planning.costs import Need, bytes_per_weight, time
from reprotune.planning.devices import Machine
from reprotune.planning.tracing import Cost
from reprotune.planning.workload import Work, dpo_work, sft_work
from reprotune.training import pairs

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight: 4 bits, a byte for each block of 64, 4 bytes for each 256 blocks (QLoRA's double
quantization, https://arxiv.org/abs/2305.14314)."""
WEIGHT, GRADIENT, ADAM = 4, 4, 8
"""Bytes a trained weight: all in float32, with Adam's two moments."""
ZERO3_LIVE = 10**9
"""Weights that DeepSpeed's ZeRO-3 holds gathered at most: the default of its stage3_max_live_parameters."""
REDUCE_BUCKET = 5 * 10**8
"""Gradients that DeepSpeed buffers to sum them over devices: the default of its reduce_bucket_size."""


@dataclass(frozen=True)
class Weights:
    """Bytes on one device."""

    whole: float
    """All weights but the adapter's, before they are dealt out to devices."""
    adapter: float
    scored: float
    """`whole` as it is scored: in model.dtype, quantized."""
    dequantized: float
    """One layer's weights, which are dequantized while it computes."""
    training: float
    """What of `whole` a device holds in training."""
    trained: float
    """Adapter, gradients and optimizer in training."""


def needs(
    settings: params.Params, config: PreTrainedConfig, machine: Machine, tokenized: dict[str, Path | None]
) -> tuple[list[Need], dict[str, Work], dict[str, int]]:
    """The needs of the stages, what sft and dpo compute, and the numbers of weights (`tracing.counts`).

    Args:
        tokenized: folders of the rows of sft and dpo; None where they are not tokenized yet.
    """
    counts = tracing.counts(tracing.policy(config, settings.model, settings.lora))
    weights = weights_of(settings, counts, machine.devices)
    text = copy.deepcopy(config.get_text_config())
    set_attention(text, settings.model.attention)
    work = {
        "sft": sft_work(settings, tokenized["sft"], machine.devices, can_attend_by_segment(text)),
        "dpo": dpo_work(settings, tokenized["dpo"], machine.devices, pairs.can_share_prompts(text)),
    }
    sft, _ = training(settings, config, machine, weights, "sft", work["sft"])
    dpo, measuring = training(settings, config, machine, weights, "dpo", work["dpo"])
    held, dequantized = weights.scored, weights.dequantized
    if counts["linear"] and settings.model.quantization == "nf4":
        full = settings.lora.method == "full"
        unquantized = (counts["frozen"] + full * counts["trained"]) * bytes_per_weight(settings.model.dtype)
        # as loading.fits_dequantized decides
        if unquantized <= loading.DEQUANTIZED_SHARE * machine.memory:
            held, dequantized = unquantized, 0
    evaluate = evaluate_need.need(settings, config, machine, held, weights.adapter, dequantized)
    return [sft, reference(work["dpo"], measuring, machine, weights), dpo, evaluate], work, counts


def weights_of(settings: params.Params, counts: dict[str, int], devices: int) -> Weights:
    full = settings.lora.method == "full"
    quantized = counts["linear"] if settings.model.quantization == "nf4" else 0
    width = bytes_per_weight(settings.model.dtype)
    trained_width = WEIGHT if full else width

    def whole(width: int) -> float:
        return quantized * NF4 + (counts["frozen"] + full * counts["trained"] - quantized) * width

    adapter = 0 if full else counts["trained"] * WEIGHT
    training = whole(trained_width)
    trained: float = adapter + counts["trained"] * (GRADIENT + ADAM)
    if devices > 1 and quantized:
        # ZeRO-2 also copies the weights that it updates
        trained = adapter + counts["trained"] * (WEIGHT + GRADIENT + ADAM) / devices
        trained += REDUCE_BUCKET * GRADIENT
    elif devices > 1:
        gathered = min(ZERO3_LIVE, counts["frozen"] + counts["trained"]) * trained_width
        training = training / devices + gathered
        trained = trained / devices + REDUCE_BUCKET * GRADIENT
    return Weights(
        whole=whole(trained_width),
        adapter=adapter,
        scored=whole(width),
        dequantized=counts["largest"] * width if quantized else 0,
        training=training,
        trained=trained,
    )


def training(
    settings: params.Params,
    config: PreTrainedConfig,
    machine: Machine,
    weights: Weights,
    stage: str,
    work: Work,
) -> tuple[Need, Cost]:
    """The need of sft or dpo, and the cost of measuring a micro-batch."""
    section = getattr(settings, stage)
    # TRL trains pairs without dropout
    lora = settings.lora if stage == "sft" else settings.lora.model_copy(update={"dropout": 0.0})
    step = tracing.cost(config, settings.model, lora, work.largest, True, section.gradient_checkpointing)
    measuring = tracing.cost(config, settings.model, lora, work.measuring, False, False)
    trained = time(step, work.largest, work.tokens, work.length, work.micro_batches, machine)
    measured = time(measuring, work.measuring, work.measured, work.length, 0, machine)
    need = Need(
        stage=stage,
        weights=weights.training,
        trained=weights.trained,
        activations=max(step.peak, measuring.peak) * machine.kind.held + weights.dequantized,
        process=machine.kind.process,
        loading=weights.whole + weights.adapter,
        steps=work.steps,
        tokens=work.tokens,
        flops=trained.flops + measured.flops,
        computing=trained.computing + measured.computing + machine.kind.start,
        starting=trained.starting,
    )
    return need, measuring


def reference(work: Work, measuring: Cost, machine: Machine, weights: Weights) -> Need:
    """The need of reference, which measures every pair once.

    Args:
        work: of dpo.
        measuring: cost of a micro-batch.
    """
    shape = work.measuring
    batches = work.held / (shape.rows * shape.examples * work.length) / machine.devices
    took = time(measuring, shape, work.held, work.length, batches, machine)
    return Need(
        stage="reference",
        weights=weights.whole,
        trained=weights.adapter,
        activations=measuring.peak * machine.kind.held + weights.dequantized,
        process=machine.kind.process,
        loading=0,
        steps=0,
        tokens=work.held,
        flops=took.flops,
        computing=took.computing + machine.kind.start,
        starting=took.starting,
    )
