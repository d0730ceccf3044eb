"""What is traced without weights is what real weights and steps give."""

import pytest
from transformers import AutoConfig

from reprotune.model import loading, policies
from reprotune.model.attention import BY_SEGMENT, Segment
from reprotune.planning import tracing
from reprotune.planning.tracing import Shape
from tests import tiny
from tests.conftest import changed

SHAPES = {"sft": Shape(1, 48, 48), "dpo": Shape(2, 40, 50, (Segment(25, 0), Segment(15, 10)))}


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_weights_are_those_of_the_real_policy(method, settings, model):
    settings = changed(settings, {"lora.method": method})
    real = loading.new_policy(model, settings.model, settings.lora, 0)
    counts = tracing.counts(tracing.policy(AutoConfig.from_pretrained(model), settings.model, settings.lora))
    trained = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in real.parameters()) - trained
    assert (counts["trained"], counts["frozen"]) == (trained, frozen)


@pytest.mark.parametrize(
    ("shape", "checkpointing", "method", "dtype"),
    [
        ("sft", False, "lora", "float32"),
        ("sft", True, "lora", "bfloat16"),
        ("dpo", False, "lora", "bfloat16"),
        ("dpo", True, "lora", "float32"),
        ("sft", False, "dora", "bfloat16"),
        ("dpo", True, "dora", "float32"),
        ("sft", True, "full", "bfloat16"),
        ("dpo", False, "full", "float32"),
        ("sft", False, "eager", "float32"),
    ],
)
def test_a_traced_step_costs_what_a_real_one_does(shape, checkpointing, method, dtype, settings, model):
    attention, method = ("eager", "lora") if method == "eager" else ("sdpa", method)
    values = {"lora.method": method, "lora.dropout": 0.1, "model.dtype": dtype, "model.attention": attention}
    settings = changed(settings, values)
    config = AutoConfig.from_pretrained(model)
    traced = tracing.traced(config, settings.model, settings.lora, SHAPES[shape], True, checkpointing)
    policy = loading.new_policy(model, settings.model, settings.lora, 0)
    if attention == "sdpa":
        policies.bare(policy).set_attn_implementation(BY_SEGMENT)
    real = tracing.watched(policy, dtype, SHAPES[shape], True, checkpointing)
    assert traced.peak == pytest.approx(real.peak, rel=0.02)
    assert (traced.matrices, traced.attention) == (real.matrices, real.attention) and traced.attention > 0
    assert traced.operations == pytest.approx(real.operations, rel=0.05)


def test_a_forward_pass_is_two_flops_a_weight_and_token(settings, model):
    settings = changed(settings, {"lora.r": 1})
    config, tokens = AutoConfig.from_pretrained(model), SHAPES["sft"].length
    counts = tracing.counts(tracing.policy(config, settings.model, settings.lora))
    weights = counts["linear"] + counts["trained"] + config.vocab_size * config.hidden_size
    traced = tracing.traced(config, settings.model, settings.lora, SHAPES["sft"], False, False)
    assert traced.matrices == 2 * tokens * weights
    # the products of queries with keys, and of their weights with values
    heads = config.num_hidden_layers * config.num_attention_heads
    assert traced.attention == 2 * 2 * tokens**2 * heads * config.head_dim


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_deep_model_costs_what_its_layers_do(architecture, settings, tmp_path):
    tiny.make_model(tmp_path, architecture=architecture)
    config = AutoConfig.from_pretrained(tmp_path)
    kinds = ["sliding_attention"] * 5 + ["full_attention"] if architecture == "gemma3" else ["full_attention"]
    config.num_hidden_layers = 20
    config.layer_types = [kinds[index % len(kinds)] for index in range(20)]
    deep, extrapolated = (
        trace(config, settings.model, settings.lora, SHAPES["sft"], True, False)
        for trace in (tracing.traced, tracing.cost)
    )
    assert extrapolated.peak == pytest.approx(deep.peak, rel=0.02)
    assert extrapolated.matrices == pytest.approx(deep.matrices, rel=1e-6)
    assert extrapolated.operations == pytest.approx(deep.operations, rel=0.02)
