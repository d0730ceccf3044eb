"""bitsandbytes: NF4 layers that stay differentiable on a CPU."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, modules

from reprotune.compat.bitsandbytes import keep_differentiable


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = Linear4bit(128, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu").eval()


def test_the_flag_decides_whether_a_pass_in_eval_mode_repacks_the_weights(layer, monkeypatch):
    """It says whether the CPU has AVX512-BF16; here it is set by hand, and nothing is repacked."""
    repacked = []
    monkeypatch.setattr(
        modules, "_convert_weight_packed_for_cpu", lambda *given: repacked.append(given) or given
    )
    layer.support_avx512bf16_for_cpu = True
    layer(torch.ones(1, 128))
    assert len(repacked) == 1
    keep_differentiable(layer)
    layer(torch.ones(1, 128))
    assert len(repacked) == 1


@pytest.mark.skipif(not modules.has_avx512bf16(), reason="this CPU has no AVX512-BF16")
@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered")
def test_the_fused_kernel_rounds_and_passes_no_gradient_on(layer):
    tokens, weight = torch.randn(4, 128), dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    def gradient() -> torch.Tensor | None:
        given = tokens.clone().requires_grad_()
        layer(given).sum().backward()
        return given.grad

    keep_differentiable(layer)
    torch.testing.assert_close(layer(tokens), tokens @ weight.T)
    torch.testing.assert_close(gradient(), weight.sum(dim=0).expand(4, -1))
    layer.support_avx512bf16_for_cpu = True
    assert (layer(tokens) - tokens @ weight.T).abs().max() > 1e-3
    assert gradient() is None
