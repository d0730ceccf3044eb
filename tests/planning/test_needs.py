"""What stages need of several devices, and of a batch that is scored."""

import dataclasses

import pytest
from transformers import AutoConfig

from reprotune.evaluation.batching import token_limit
from reprotune.planning import evaluate_need, needs, tracing
from reprotune.planning.published import BENCHMARKS
from tests.conftest import changed
from tests.planning.recipe import prepared


@pytest.mark.slow
def test_devices_share_what_deepspeed_parts(model):
    """ZeRO-2 parts gradients and optimizer; ZeRO-3 also the weights, and gathers those of some layers."""
    settings, _, machine, tokenized = prepared("--gpu", "h100-80gb")
    config, four = AutoConfig.from_pretrained(model), dataclasses.replace(machine, devices=4)

    def sft(settings):
        return [needs.needs(settings, config, devices, tokenized)[0][0] for devices in (machine, four)]

    alone, parted = sft(settings)
    trained = tracing.counts(tracing.policy(config, settings.model, settings.lora))["trained"]
    assert parted.weights == alone.weights and alone.trained == 16 * trained
    assert parted.trained == (4 + 16 / 4) * trained + 4 * needs.REDUCE_BUCKET
    alone, parted = sft(changed(settings, {"lora.method": "full", "model.quantization": "none"}))
    assert parted.weights == alone.weights * 1.25
    assert parted.trained == alone.trained / 4 + 4 * needs.REDUCE_BUCKET
    # each device has all of them before they are dealt out
    assert parted.loading == alone.weights


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_a_scored_batch_is_as_large_as_scoring_makes_it(batch_tokens, settings):
    """It has room for continuations of a long prefix, by the rule of the batches themselves."""
    size = BENCHMARKS["hellaswag"]
    values = {"benchmarks.hellaswag.limit": None, "benchmarks.hellaswag.num_fewshot": 10}
    benchmark = changed(settings, values).benchmarks["hellaswag"]
    work = evaluate_need.scored(benchmark, size, batch_tokens)
    assert work.longest == 10 * (size.question + size.answer) + size.longest
    assert work.batch == token_limit(batch_tokens, work.longest) == max(batch_tokens, 4 * work.longest)
