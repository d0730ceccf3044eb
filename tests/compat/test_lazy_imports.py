"""A cell skips imports that it never uses: its scores stay the same, and what is skipped comes on demand."""

import pytest

from tests.compat.fresh import python

CELL = """
import sys
arguments, sys.argv = sys.argv, ["-m"]
from reprotune.process import command
from stages import evaluate
sys.argv = arguments
command(evaluate.main)
print(*sorted(sys.modules))
"""
# training, compiling, sharding, plotting and planning: each takes seconds to load
NEVER = {
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "scipy.optimize",
    "trl",
    "deepspeed",
    "matplotlib",
    "vllm",
    "dvc",
    "sklearn",
    "nltk",
}


@pytest.mark.parametrize("benchmark", ["arc_challenge", "gsm8k"])
def test_a_cell_loads_only_what_it_needs_and_scores_as_with_all_loaded(benchmark, finished, tmp_path):
    for name, code in (("lazy", CELL), ("all", f"import transformers\n{CELL}")):
        outputs = [f"--{kind}={tmp_path / name / kind}" for kind in ("checkpoints", "samples", "metrics")]
        inputs = [
            "--base=models/base",
            "--adapter=models/sft",
            f"--data=data/raw/benchmarks/{benchmark}",
            "--templates=templates",
        ]
        loaded = set(python(code, benchmark, *inputs, *outputs, cwd=finished).split())
        assert bool(loaded & NEVER) == (name == "all"), loaded & NEVER
    for kind in ("samples", "metrics"):
        assert (tmp_path / "lazy" / kind).read_bytes() == (tmp_path / "all" / kind).read_bytes()


def test_what_was_left_out_is_there_when_it_is_used():
    code = """
import sys, torch
import stages.evaluate
from transformers import masking_utils
from transformers.loss import loss_for_object_detection

assert not {"torch._dynamo", "scipy.optimize"} & sys.modules.keys()
given = dict(batch_size=1, q_length=4, kv_length=4, allow_is_causal_skip=False)
assert torch.equal(masking_utils.sdpa_mask(**given, use_vmap=True), masking_utils.sdpa_mask(**given))
assert "__file__" in vars(sys.modules["torch._dynamo"])
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
print(*loss_for_object_detection.linear_sum_assignment([[4, 1], [2, 3]]))
"""
    assert python(code) == "[0 1] [1 0]\n"


def test_a_placeholder_gives_way_to_what_asks_for_more():
    """Other installed packages, such as torchvision, import parts of the compiler."""
    code = """
import sys
from reprotune.compat import lazy_imports

with lazy_imports.for_scoring():
    import torch._dynamo as early
    assert isinstance(early, lazy_imports.Placeholder)
    from torch._dynamo.utils import is_compile_supported
    from scipy.optimize import linear_sum_assignment
    import transformers.masking_utils
import torch
compiler = torch._dynamo
assert compiler.utils.is_compile_supported is is_compile_supported
assert sys.modules["torch._dynamo"].utils is sys.modules["torch._dynamo.utils"]
assert sys.modules["torch._dynamo.utils"].__spec__.origin.endswith("utils.py")
assert early.config is compiler.config
assert not [name for name, module in sys.modules.items() if isinstance(module, lazy_imports.Placeholder)]
real = compiler._trace_wrapped_higher_order_op.TransformGetItemToIndex
assert transformers.masking_utils.TransformGetItemToIndex is real
with lazy_imports.without_compiler():
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
print("done")
"""
    assert python(code) == "done\n"


@pytest.fixture(scope="module")
def all_modules() -> set[str]:
    code = """
import sys
import transformers.masking_utils, transformers.loss.loss_for_object_detection
from transformers import PreTrainedModel
print(*sys.modules)
"""
    return set(python(code).split())


@pytest.mark.parametrize("skipped", ["torch._dynamo", "torch.distributed.tensor", "scipy.optimize"])
def test_transformers_imports_what_is_skipped(skipped, all_modules):
    """If a new version no longer does, its placeholder can go."""
    assert skipped in all_modules


@pytest.mark.parametrize(
    ("inside", "compiler"), [("contextlib.nullcontext", True), ("lazy_imports.for_scoring", False)]
)
def test_bitsandbytes_alone_imports_the_compiler(inside, compiler):
    """Through PEFT, which imports it."""
    code = f"""
import contextlib, sys, torch
from reprotune.compat import lazy_imports
real = torch.compile
with {inside}():
    import peft
print("bitsandbytes" in sys.modules, torch.compile is real, "torch._dynamo" in sys.modules)
"""
    assert python(code) == f"True True {compiler}\n"


@pytest.mark.parametrize(
    ("inside", "compiler"), [("contextlib.nullcontext", True), ("lazy_imports.without_compiler", False)]
)
def test_loading_a_model_alone_imports_the_compiler(inside, compiler, settings, model):
    """torch exempts the initialization of weights from compilation."""
    code = f"""
import contextlib, sys
from pathlib import Path
from reprotune.compat import lazy_imports
with lazy_imports.for_scoring():
    from reprotune.model import loading
    from reprotune.params import Model
with {inside}():
    loading.load_base(Path(sys.argv[1]), Model.model_validate_json(sys.argv[2]))
print("torch._dynamo" in sys.modules)
"""
    assert python(code, str(model), settings.model.model_dump_json()) == f"{compiler}\n"
