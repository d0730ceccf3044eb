"""Score one model on one benchmark with lm-eval's own task definition, on the pinned local rows.

`metrics/<m>/<b>.json` gets the score, its standard error, n and the task's other metrics; `evals/<m>/<b>.parquet` a row a
sample. With a `limit`, the rows are a subset drawn by seed, the same for every model.
"""

import argparse
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from stages import InputError, command, modeling, params, tasks
from stages.chat import load_tokenizer
from stages.records import parquet_file, write_json, write_parquet

SAMPLE = pa.schema(
    {
        "doc_id": pa.int64(),
        "doc": pa.string(),
        "prompt": pa.string(),
        "choices": pa.list_(pa.string()),
        "log_probs": pa.list_(pa.float64()),
        "generation": pa.string(),
        "gold": pa.string(),
        "predicted": pa.string(),
        "correct": pa.float64(),
    }
)
"""A scored row. `doc` is the benchmark's row as JSON; a task that generates has no choices and no log_probs."""


def run(settings: params.Params, name: str, paths: argparse.Namespace) -> None:
    from lm_eval.models.huggingface import HFLM

    modeling.start(settings.seed)
    tokenizer = load_tokenizer(paths.base, paths.templates / f"{settings.model.chat_template}.jinja")
    if paths.adapter is None:
        model = modeling.load_base(paths.base, settings.model)
    else:
        model = modeling.load_policy(paths.base, paths.adapter, settings.model)
    model.config.use_cache = True
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.evaluate.batch_size)
    new_tokens = settings.benchmarks[name].max_new_tokens or 0
    if new_tokens >= scorer.max_length:
        raise InputError(f"params.yaml: benchmarks.{name}.max_new_tokens: found {new_tokens}, expected fewer than the model's context of {scorer.max_length}")
    metrics, samples = score(scorer, name, settings.benchmarks[name], paths.data, settings.seed)
    write_parquet(paths.samples, samples, SAMPLE)
    write_json(paths.metrics, metrics)
    print(f"{name}: {settings.benchmarks[name].metric} = {metrics['score']:.4f} ± {metrics['stderr']:.4f} (n = {metrics['n']})")


def score(scorer: Any, name: str, benchmark: params.Benchmark, data: Path, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run lm-eval on `data/<split>.parquet`.

    Args:
        scorer: an lm-eval model.
        data: folder with a Parquet file of the scored split, and under `fewshot/` one of the examples' if that is another.

    Returns:
        The metrics, and one dict a sample, in the order of the benchmark's rows.
    """
    file = data / f"{benchmark.split}.parquet"
    indices = subset(file, name, benchmark.limit, seed)
    examples = file if benchmark.fewshot_split == benchmark.split else data / "fewshot" / f"{benchmark.fewshot_split}.parquet"
    check_shots(name, benchmark.num_fewshot, examples, examples == file)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "task.yaml").write_text(yaml.safe_dump(task_definition(name, benchmark, data, Path(folder) / "cache")))
        results = simple_evaluate(
            scorer,
            tasks=[f"local_{name}"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            samples={f"local_{name}": indices},
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return task_metrics(results, name, benchmark), sample_rows(results["samples"][f"local_{name}"], benchmark)


def subset(file: Path, name: str, limit: int | None, seed: int) -> list[int]:
    """Row numbers to score, in order; drawn by seed and benchmark, so adding a benchmark changes no other."""
    count = row_count(file)
    if count < 2:
        raise InputError(f"{file}: {count} rows, expected at least 2 to score, which a standard error needs; correct benchmarks.{name}.source")
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{seed} {name}").sample(range(count), limit))


def row_count(file: Path) -> int:
    with parquet_file(file) as table:
        return table.metadata.num_rows


def check_shots(name: str, shots: int, file: Path, scored: bool) -> None:
    """A row is never its own example, so of the scored rows one is not to be had."""
    if shots and shots > (count := row_count(file) - scored):
        raise InputError(f"params.yaml: benchmarks.{name}.num_fewshot: found {shots}, expected at most {count}, the examples in {file}")


def task_definition(name: str, benchmark: params.Benchmark, data: Path, cache: Path) -> dict[str, Any]:
    """lm-eval's own definition, included by path, with our rows in place of the Hub's."""
    stock = tasks.definitions([name])[name]
    splits = {file.stem: str(file.resolve()) for file in sorted(data.rglob("*.parquet"))}
    definition = {
        "include": str(stock),
        "task": f"local_{name}",
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str(cache)},
        "training_split": "train" if "train" in splits else None,
        "validation_split": benchmark.split if benchmark.split == "validation" else None,
        "test_split": benchmark.split if benchmark.split == "test" else None,
        "fewshot_split": benchmark.fewshot_split if benchmark.num_fewshot else benchmark.split,
        "num_fewshot": benchmark.num_fewshot,
    }
    if benchmark.max_new_tokens is not None:
        until = tasks.generation(name, stock)["until"]
        definition["generation_kwargs"] = {"until": until, "do_sample": False, "max_gen_toks": benchmark.max_new_tokens}
    return definition


def task_metrics(results: dict[str, Any], name: str, benchmark: params.Benchmark) -> dict[str, Any]:
    """`score` and `stderr` are those of the benchmark's own metric; `metrics` lists all of the task's, as lm-eval names them."""
    found = results["results"][f"local_{name}"]
    # a metric without a standard error has a text there
    metrics = {
        key: {"metric": key, "value": value, "stderr": stderr if isinstance(stderr := found[key.replace(",", "_stderr,")], float) else None}
        for key, value in found.items()
        if "," in key and "_stderr," not in key
    }
    if benchmark.metric not in metrics:
        raise InputError(f"params.yaml: benchmarks.{name}.metric: found {benchmark.metric!r}, expected one of {sorted(metrics)}")
    own = metrics[benchmark.metric]
    if own["stderr"] is None:
        raise InputError(f"params.yaml: benchmarks.{name}.metric: found {benchmark.metric!r}, which has no standard error, expected one that does")
    n = results["n-samples"][f"local_{name}"]["effective"]
    return {"score": own["value"], "stderr": own["stderr"], "n": n, "metrics": [metrics[key] for key in sorted(metrics)]}


def sample_rows(samples: list[dict[str, Any]], benchmark: params.Benchmark) -> list[dict[str, Any]]:
    metric, selection = benchmark.metric.split(",")
    rows = [sample_row(sample, metric) for sample in samples if sample["filter"] == selection]
    return sorted(rows, key=lambda row: row["doc_id"])


def sample_row(sample: dict[str, Any], metric: str) -> dict[str, Any]:
    arguments = sample["arguments"]
    row = {
        "doc_id": sample["doc_id"],
        "doc": json.dumps(sample["doc"], sort_keys=True, ensure_ascii=False),
        "gold": str(sample["target"]),
        "correct": float(sample[metric]),
    }
    if len(arguments) == 1:
        return row | {
            "prompt": arguments[0][0],
            "choices": None,
            "log_probs": None,
            "generation": sample["resps"][0][0],
            "predicted": str(sample["filtered_resps"][0]),
        }
    log_probs = [float(response[0][0]) for response in sample["resps"]]
    if not all(map(math.isfinite, log_probs)):
        raise InputError(f"row {sample['doc_id']}: the model gives log-probs of {log_probs}, expected finite numbers; its adapter or base is damaged")
    contexts, continuations = zip(*arguments, strict=True)
    shared = len(set(contexts)) == 1
    return row | {
        "prompt": contexts[0] if shared else "",
        "choices": list(continuations) if shared else [context + continuation for context, continuation in arguments],
        "log_probs": log_probs,
        "generation": None,
        "predicted": str(log_probs.index(max(log_probs))),
    }


def main() -> None:
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--adapter", type=Path)
    for name in ("base", "data", "templates", "samples", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.adapter == arguments.base:
        arguments.adapter = None
    run(params.load(), arguments.name, arguments)


if __name__ == "__main__":
    command(main)
