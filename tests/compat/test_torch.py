"""torch: repeatable kernels, memory that is neither filled nor given back, and small matrix products.

Only a GPU shows that cuDNN's attention is slow for new lengths and not repeatable; its flag is tested here.
"""

from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs

from reprotune.compat.torch import (
    TransposedLinear,
    avoid_cudnn_attention,
    leave_new_memory_unfilled,
    use_repeatable_kernels,
)
from tests.compat.fresh import python
from tests.tiny import make_policy


@pytest.fixture(autouse=True)
def flags_restored():
    deterministic = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    benchmark, cudnn = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.set_deterministic_debug_mode(mode)
    deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def unrepeatable() -> None:
    """An operation for which torch has no repeatable kernel, on any device."""
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_an_unrepeatable_kernel_is_an_error_or_a_warning():
    torch.set_deterministic_debug_mode("default")
    unrepeatable()
    use_repeatable_kernels(warn_only=False)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        unrepeatable()
    use_repeatable_kernels(warn_only=True)
    with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
        unrepeatable()


def test_flash_attention_is_asked_to_repeat(monkeypatch):
    supported = defaultdict(bool, deterministic=True)

    def asked() -> bool:
        return _process_flash_attention_kwargs(4, 4, True, supports_mapping=supported)["deterministic"]

    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    assert not asked()
    use_repeatable_kernels(warn_only=False)
    assert asked()


def test_kernels_repeat_compiled_or_not():
    code = """
from reprotune.model import determinism
import torch
determinism.start(1)
import torch._inductor.config as config
print(torch.get_deterministic_debug_mode(), config.deterministic)
"""
    assert python(code) == "2 True\n"


def test_torchs_own_switch_imports_the_compiler():
    """The other one does not, and does not tell the compiler either: a variable in the environment does."""
    code = """
import sys, torch
torch.set_deterministic_debug_mode("error")
print("torch._inductor" in sys.modules)
import torch._inductor.config as config
print(config.deterministic)
"""
    assert python(code, unset=["TORCHINDUCTOR_DETERMINISTIC"]) == "False\nFalse\n"
    code = (
        "import sys, torch; torch.use_deterministic_algorithms(True); print('torch._inductor' in sys.modules)"
    )
    assert python(code) == "True\n"


def test_new_memory_is_filled_unless_told_otherwise():
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1000).isnan().all()
    leave_new_memory_unfilled()
    used = torch.ones(1000)
    del used
    assert not torch.empty(1000).isnan().all()


def test_cudnn_attention_is_on_unless_told_otherwise():
    assert python("import torch; print(torch.backends.cuda.cudnn_sdp_enabled())") == "True\n"
    torch.backends.cuda.enable_cudnn_sdp(True)
    avoid_cudnn_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_freed_memory_is_paged_in_again_unless_kept():
    code = """
import platform, resource, torch
from reprotune.compat.torch import keep_freed_memory

def page_faults():
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin

before = page_faults()
keep_freed_memory()
page_faults()
print(platform.libc_ver()[0], before, page_faults())
"""
    libc, before, after = python(code).split()
    assert libc != "glibc" or int(after) < int(before) / 10, (before, after)


class WeightFirst(TorchDispatchMode):
    """Counts matrix products whose first factor is one of these weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {parameter.data_ptr() for parameter in model.parameters() if parameter.dim() == 2}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.count += args[0].data_ptr() in self.weights
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, True), (torch.bfloat16, False)])
def test_linear_layers_of_a_model_are_computed_weight_first(dtype, transposed):
    model = make_policy("qwen3", "sdpa").to(dtype).eval()
    ids = torch.arange(8)[None]
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    with torch.no_grad():
        with WeightFirst(model) as plain:
            expected = model(ids, use_cache=False).logits
        with WeightFirst(model) as few, TransposedLinear():
            logits = model(ids, use_cache=False).logits
    assert (plain.count, few.count) == (0, layers if transposed else 0)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
