"""A cell leaves out what it never uses: its scores do not depend on that, and all is there for who asks for it later."""

import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT

CELL = """
import sys
arguments, sys.argv = sys.argv, ["-m"]
from stages import command, evaluate
sys.argv = arguments
command(evaluate.main)
print(*sorted(sys.modules))
"""
# what trains, compiles, shards, draws or plans takes seconds to load
NEVER = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "scipy.optimize", "trl", "deepspeed", "matplotlib", "vllm", "dvc", "sklearn", "nltk"}


def python(code: str, *arguments: str, cwd=ROOT) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("benchmark", ["arc_challenge", "gsm8k"])
def test_a_cell_loads_only_what_it_needs_and_scores_as_with_all_loaded(benchmark, finished, tmp_path):
    for name, code in (("lean", CELL), ("all", f"import transformers\n{CELL}")):
        outputs = [f"--{kind}={tmp_path / name / kind}" for kind in ("checkpoints", "samples", "metrics")]
        inputs = ["--base=models/base", "--adapter=models/sft", f"--data=data/raw/benchmarks/{benchmark}", "--templates=templates"]
        loaded = set(python(code, benchmark, *inputs, *outputs, cwd=finished).split())
        assert bool(loaded & NEVER) == (name == "all"), loaded & NEVER
    for kind in ("samples", "metrics"):
        assert (tmp_path / "lean" / kind).read_bytes() == (tmp_path / "all" / kind).read_bytes()


def test_what_was_left_out_is_there_when_it_is_used():
    code = """
import sys, torch
import stages.evaluate
from transformers import masking_utils
from transformers.loss import loss_for_object_detection

assert not {"torch._dynamo", "scipy.optimize"} & sys.modules.keys()
given = dict(batch_size=1, q_length=4, kv_length=4, allow_is_causal_skip=False)
assert torch.equal(masking_utils.sdpa_mask(**given, use_vmap=True), masking_utils.sdpa_mask(**given))
assert "__file__" in vars(sys.modules["torch._dynamo"]) and torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
print(*loss_for_object_detection.linear_sum_assignment([[4, 1], [2, 3]]))
"""
    assert python(code) == "[0 1] [1 0]\n"


def test_what_stands_in_gives_way_to_what_asks_for_more():
    """Packages that a user may have beside ours, such as torchvision, import parts of the compiler."""
    code = """
import sys
from stages import lean

with lean.imports():
    import torch._dynamo as early
    assert isinstance(early, lean.StandIn)
    from torch._dynamo.utils import is_compile_supported
    from scipy.optimize import linear_sum_assignment
    import transformers.masking_utils
import torch
assert torch._dynamo.utils.is_compile_supported is is_compile_supported and sys.modules["torch._dynamo"].utils is sys.modules["torch._dynamo.utils"]
assert sys.modules["torch._dynamo.utils"].__spec__.origin.endswith("utils.py") and early.config is torch._dynamo.config
assert not [name for name, module in sys.modules.items() if isinstance(module, lean.StandIn)]
assert transformers.masking_utils.TransformGetItemToIndex is torch._dynamo._trace_wrapped_higher_order_op.TransformGetItemToIndex
with lean.without_compiler():
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
print("done")
"""
    assert python(code) == "done\n"


def test_torch_takes_kernels_that_repeat_compiled_or_not():
    code = "from stages import modeling; import torch; modeling.start(1); import torch._inductor.config as config; print(torch.get_deterministic_debug_mode(), config.deterministic)"
    assert python(code) == "2 True\n"
