"""Names of models, comparisons and benchmarks as readers see them."""

from reprotune.comparison.scores import MEAN
from reprotune.report.translation import say

BENCHMARKS = {
    "arc_challenge": "ARC-Challenge", "boolq": "BoolQ", "commonsense_qa": "CommonsenseQA", "gsm8k": "GSM8K",
    "hellaswag": "HellaSwag", "humaneval": "HumanEval", "ifeval": "IFEval", "mmlu": "MMLU",
    "openbookqa": "OpenBookQA", "piqa": "PIQA", "truthfulqa": "TruthfulQA", "winogrande": "WinoGrande",
}  # fmt: skip


def model_names() -> dict[str, str]:
    return {"base": say("base"), "sft": say("SFT"), "dpo": say("SFT + DPO")}


def comparison_names() -> dict[str, str]:
    return {
        "sft_vs_base": say("SFT − base"),
        "dpo_vs_sft": say("DPO − SFT"),
        "dpo_vs_base": say("SFT + DPO − base"),
    }


def benchmark_name(name: str) -> str:
    """The display name of a benchmark or of the mean; a benchmark that is not in BENCHMARKS keeps its own."""
    return say("mean") if name == MEAN else BENCHMARKS.get(name, name)
