"""The lm-eval model that a cell is scored with, by `evaluate.backend`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from lm_eval.api.model import LM
from transformers import PreTrainedTokenizerBase

from reprotune import params
from reprotune.compat import lazy_imports
from reprotune.evaluation import tasks
from reprotune.evaluation.lm_eval_model import Scorer
from reprotune.model import decoding, loading, policies
from reprotune.records import read_json, write_json


def with_transformers(
    settings: params.Params, paths: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, run: Path
) -> LM:
    dequantized = loading.fits_dequantized(paths.base, settings.model)
    with lazy_imports.without_compiler():
        if paths.adapter is None:
            policy = loading.load_base(paths.base, settings.model, dequantized)
        else:
            policy = loading.load_policy(paths.base, paths.adapter, settings.model, dequantized=dequantized)
    policies.bare(policy).generation_config = decoding.of_run(paths.base, tokenizer)
    return Scorer(policy, tokenizer, settings.evaluate.batch_tokens, settings.evaluate.batch_texts, run)


def with_vllm(
    settings: params.Params, paths: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, run: Path
) -> LM:
    """lm-eval's vLLM model on the same weights.

    A base in NF4 is written to disk as it is here: vLLM would quantize it in its own way.
    """
    tasks.check_backend("vllm")
    from lm_eval.models.vllm_causallms import VLLM

    tokenizer.save_pretrained(run / "tokenizer")
    ends = decoding.of_run(paths.base, tokenizer).eos_token_id
    write_json(run / "tokenizer" / "generation_config.json", {"eos_token_id": ends})
    fully_trained = paths.adapter is not None and (paths.adapter / "config.json").exists()
    base, adapter = (paths.adapter, None) if fully_trained else (paths.base, paths.adapter)
    if settings.model.quantization == "nf4":
        loading.load_base(base, settings.model).save_pretrained(run / "base")
        base = run / "base"
    # vLLM takes the tokens that end a generation from there
    options = {"generation_config": str(run / "tokenizer")}
    if adapter is not None:
        rank = read_json(adapter / "adapter_config.json")["r"]
        options |= {"lora_local_path": str(adapter), "max_lora_rank": rank}
    tokens = str(run / "tokenizer")
    return VLLM(str(base), settings.model.dtype, tokenizer=tokens, seed=settings.seed, **options)


BACKENDS: dict[str, Callable[[params.Params, argparse.Namespace, PreTrainedTokenizerBase, Path], LM]] = {
    "transformers": with_transformers,
    "vllm": with_vllm,
}
"""Each loads the model; the last argument is the run's folder, for checkpoints and what a backend writes."""
