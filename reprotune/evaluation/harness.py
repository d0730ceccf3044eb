"""lm-eval's own tasks on local rows: their definitions, with local files for the Hub's, and their metrics."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean, mean_stderr
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from reprotune import params
from reprotune.compat.lm_eval import seed_language_detection, without_environment
from reprotune.errors import InputError
from reprotune.evaluation import protocol, rows, tasks
from reprotune.evaluation.protocol import Protocol
from reprotune.evaluation.rows import Part, row_count
from reprotune.evaluation.samples import sample_rows

Samples = dict[str, list[dict[str, Any]]]
"""lm-eval's samples, by task."""


def score(
    scorer: LM, name: str, benchmark: params.Benchmark, data: Path, seed: int, chat: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]], Protocol]:
    """Score a model on a benchmark.

    Args:
        scorer: an lm-eval model.
        data: folder with a Parquet file of the scored split, and under `fewshot/` one of the examples'
            split if that is another.
        chat: whether prompts are turns of a chat.

    Returns:
        The metrics (`task_metrics`), the rows of SAMPLE, and the task's part of the protocol.
    """
    scored = data / f"{benchmark.split}.parquet"
    indices = rows.subset(scored, name, benchmark.limit, seed)
    examples = scored
    if benchmark.fewshot_split != benchmark.split:
        examples = data / "fewshot" / f"{benchmark.fewshot_split}.parquet"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = [scored] if examples == scored else [scored, examples]
        parts = rows.split_by_task(name, benchmark, files, indices, folder)
        manager, loaded = load_tasks(name, benchmark, parts, folder)
        seed_language_detection(seed)
        with without_environment():
            results = simple_evaluate(
                scorer,
                tasks=loaded,
                task_manager=manager,
                samples={local(part.task): list(part.numbers) for part in parts},
                apply_chat_template=chat,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    samples: Samples = {part.task: results["samples"][local(part.task)] for part in parts}
    requests = [sample["arguments"] for of_task in samples.values() for sample in of_task]
    asked = protocol.of_task(
        name, benchmark, seed, scored, examples, indices, results["versions"].values(), requests
    )
    return task_metrics(results, samples, name, benchmark), sample_rows(samples, parts, benchmark), asked


def local(task: str) -> str:
    """The name under which lm-eval gets our definition of its task."""
    return f"local_{task}"


def load_tasks(
    name: str, benchmark: params.Benchmark, parts: list[Part], folder: Path
) -> tuple[TaskManager, list[Any]]:
    """Load lm-eval's task of each part, with the rows in `folder/<task>`.

    Raises:
        InputError: a task cannot be scored on these rows, as its entry in params.yaml says.
    """
    files = tasks.definitions({part.task: name for part in parts})
    for part in parts:
        examples = folder / part.task / f"{benchmark.fewshot_split}.parquet"
        scored = benchmark.fewshot_split == benchmark.split
        rows.check_shots(name, benchmark.num_fewshot, examples, scored)
        definition = task_definition(name, part.task, files[part.task], benchmark, folder)
        (folder / f"{part.task}.yaml").write_text(definition)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load([local(part.task) for part in parts])["tasks"]
    for part in parts:
        documents = len(loaded[local(part.task)].eval_docs)
        scored_rows = row_count(folder / part.task / f"{benchmark.split}.parquet")
        rows.check_documents(name, part.task, documents, scored_rows)
    return manager, list(loaded.values())


def task_definition(name: str, task: str, stock: Path, benchmark: params.Benchmark, folder: Path) -> str:
    """lm-eval's definition in `stock`, with the rows in `folder/<task>`, as YAML.

    A task that runs generated code gets the project's sandbox. It is copied, not included: lm-eval's own
    would fetch code from the Hub.
    """
    splits = {file.stem: str(file) for file in sorted((folder / task).glob("*.parquet"))}
    ours: dict[str, Any] = {
        "task": local(task),
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str(folder / "cache")},
        "training_split": "train" if "train" in splits and benchmark.split != "train" else None,
        "validation_split": benchmark.split if benchmark.split == "validation" else None,
        "test_split": benchmark.split if benchmark.split != "validation" else None,
        "fewshot_split": benchmark.fewshot_split if benchmark.num_fewshot else benchmark.split,
        "num_fewshot": benchmark.num_fewshot,
    }
    theirs = tasks.read(stock)
    runs_code = tasks.check(name, benchmark, task, theirs)
    if benchmark.max_new_tokens is not None:
        ours["generation_kwargs"] = {
            "until": theirs["generation_kwargs"]["until"],
            "do_sample": False,
            "max_gen_toks": benchmark.max_new_tokens,
        }
    if not runs_code:
        return yaml.safe_dump({"include": str(stock), **ours})
    (folder / "sandboxed.py").write_text("from reprotune.evaluation.sandbox import process_results\n")
    kept = ("output_type", "doc_to_text", "doc_to_target", "generation_kwargs", "metadata")
    sandboxed = {
        **{key: theirs[key] for key in kept},
        "filter_list": [{"name": "create_test", "filter": [{"function": "take_first"}]}],
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    }
    return yaml.safe_dump(sandboxed | ours) + "process_results: !function sandboxed.process_results\n"


def task_metrics(
    results: dict[str, Any], samples: Samples, name: str, benchmark: params.Benchmark
) -> dict[str, Any]:
    """`score` and `stderr` of the benchmark's metric, `n`, and under `metrics` all of the task's metrics.

    Every row counts alike, whichever of several tasks scores it.

    Raises:
        InputError: the task does not give the benchmark's metric, or gives it without a standard error.
    """
    first = results["results"][local(next(iter(samples)))]
    metrics = {}
    for key in (key for key in first if "," in key and "_stderr," not in key):
        value, stderr = first[key], first[key.replace(",", "_stderr,")]
        if len(samples) > 1:
            metric, selection = key.split(",")
            of_rows = [
                float(sample[metric])
                for of_task in samples.values()
                for sample in of_task
                if sample["filter"] == selection
            ]
            value, stderr = mean(of_rows), mean_stderr(of_rows)
        # lm-eval gives a text where a metric has no standard error
        stderr = stderr if isinstance(stderr, float) else None
        metrics[key] = {"metric": key, "value": value, "stderr": stderr}
    key = f"params.yaml: benchmarks.{name}.metric: found {benchmark.metric!r}"
    if benchmark.metric not in metrics:
        raise InputError(f"{key}, expected one of {sorted(metrics)}")
    score = metrics[benchmark.metric]
    if score["stderr"] is None:
        raise InputError(f"{key}, which has no standard error, expected one that does")
    return {
        "score": score["value"],
        "stderr": score["stderr"],
        "n": sum(results["n-samples"][local(task)]["effective"] for task in samples),
        "metrics": [metrics[key] for key in sorted(metrics)],
    }
