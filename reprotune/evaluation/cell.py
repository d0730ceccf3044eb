"""A cell: one model scored on one benchmark, into a metrics file and a Parquet file of samples."""

import argparse
from importlib.metadata import version
from typing import Any

import datasets

from reprotune import params
from reprotune.data.templates import load_tokenizer, template_file
from reprotune.errors import InputError
from reprotune.evaluation import harness, protocol
from reprotune.evaluation.backends import BACKENDS
from reprotune.evaluation.samples import SAMPLE
from reprotune.model import decoding, determinism
from reprotune.records import write_metrics, write_parquet
from reprotune.training import checkpoints


def run(settings: params.Params, name: str, paths: argparse.Namespace) -> None:
    """Score a model on the benchmark `name`.

    Args:
        paths: base, adapter (None or the base itself to score the base), data, templates, checkpoints, and
            samples and metrics, the files to write.
    """
    datasets.disable_progress_bars()
    if paths.adapter == paths.base:
        paths = argparse.Namespace(**vars(paths) | {"adapter": None})
    determinism.start(settings.seed, warn_only=True)
    template = template_file(paths.templates, paths.base, settings.model)
    benchmark = settings.benchmarks[name]
    inputs = [paths.base, *([paths.adapter] if paths.adapter else []), paths.data, template]
    with checkpoints.kept(paths.checkpoints, read_from(settings, name), inputs) as folder:
        tokenizer = load_tokenizer(paths.base, template)
        scorer = BACKENDS[settings.evaluate.backend](settings, paths, tokenizer, folder)
        check_length(name, benchmark, scorer.max_length)
        chat = settings.evaluate.chat_template if benchmark.chat_template is None else benchmark.chat_template
        metrics, samples, asked = harness.score(scorer, name, benchmark, paths.data, settings.seed, chat)
        asked |= protocol.of_model(settings, template, tokenizer.eos_token, chat)
        asked |= protocol.of_decoding(
            asked, decoding.of_run(paths.base, tokenizer), tokenizer, settings.evaluate.backend
        )
        metrics |= protocol.record(asked)
        write_parquet(paths.samples, samples, SAMPLE)
        headline = {key: metrics.pop(key) for key in ("score", "n")}
        write_metrics(paths.metrics, headline, metrics)
    print(
        f"{name}: {benchmark.metric} = {headline['score']:.4f} ± {metrics['stderr']:.4f} "
        f"(n = {headline['n']}; protocol {metrics['protocol']})"
    )


def read_from(settings: params.Params, name: str) -> dict[str, Any]:
    """What a cell's answers depend on, apart from files and code: a checkpoint is of the same values."""
    return {
        "seed": settings.seed,
        "model": settings.model.model_dump(exclude={"source"}),
        "benchmark": settings.benchmarks[name].model_dump(exclude={"source", "format"}),
        "lm_eval": version("lm_eval"),
        "evaluate": settings.evaluate.model_dump(exclude={"benchmarks"}),
    }


def check_length(name: str, benchmark: params.Benchmark, context: int) -> None:
    """Raise InputError if a generation would leave no room for a prompt in the model's context."""
    new_tokens = benchmark.max_new_tokens or 0
    if new_tokens >= context:
        raise InputError(
            f"params.yaml: benchmarks.{name}.max_new_tokens: found {new_tokens}, expected fewer than the "
            f"model's context of {context}"
        )
