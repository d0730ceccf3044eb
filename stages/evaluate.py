"""Score one model on one benchmark with lm-eval's own task definition, on the pinned local rows.

`metrics/<m>/<b>.json` gets the score, its standard error, n and the task's other metrics; `evals/<m>/<b>.parquet` a row a
sample. With a `limit`, the rows are a subset drawn by seed, the same for every model.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import yaml

from stages import InputError, command, lean

with lean.imports():
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.api.metrics import mean, mean_stderr
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

    from stages import checkpoints, modeling, params, tasks
    from stages.records import digest, parquet_file, read_json, read_parquet, write_json, write_parquet
    from stages.scoring import Scorer
    from stages.templating import load_tokenizer

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
    modeling.start(settings.seed, warn_only=True)
    template = paths.templates / f"{settings.model.chat_template}.jinja"
    benchmark, inputs = settings.benchmarks[name], [paths.base, *([paths.adapter] if paths.adapter else []), paths.data, template]
    read = {"seed": settings.seed, "model": settings.model.model_dump(), "benchmark": benchmark.model_dump(), "lm_eval": version("lm_eval")}
    read["evaluate"] = settings.evaluate.model_dump(exclude={"benchmarks"})
    with checkpoints.kept(paths.checkpoints, read, inputs) as run:
        tokenizer = load_tokenizer(paths.base, template)
        scorer = BACKENDS[settings.evaluate.backend](settings, paths, tokenizer, run)
        new_tokens = benchmark.max_new_tokens or 0
        if new_tokens >= scorer.max_length:
            raise InputError(f"params.yaml: benchmarks.{name}.max_new_tokens: found {new_tokens}, expected fewer than the model's context of {scorer.max_length}")
        chat = settings.evaluate.chat_template if benchmark.chat_template is None else benchmark.chat_template
        metrics, samples, protocol = score(scorer, name, benchmark, paths.data, settings.seed, chat)
        protocol |= {"chat_template": f"{settings.model.chat_template} {digest(template)[:12]}" if chat else "none", "end_of_turn": tokenizer.eos_token}
        protocol |= {"backend": f"{settings.evaluate.backend} {version(settings.evaluate.backend)}"}
        protocol |= {key: getattr(settings.model, key) for key in ("dtype", "quantization", "attention")}
        # a list, which `dvc metrics` leaves out
        metrics |= {"protocol": short(sorted(protocol.items())), "protocol_parts": [f"{part}: {value}" for part, value in sorted(protocol.items())]}
        write_parquet(paths.samples, samples, SAMPLE)
        write_json(paths.metrics, metrics)
    print(f"{name}: {benchmark.metric} = {metrics['score']:.4f} ± {metrics['stderr']:.4f} (n = {metrics['n']}; protocol {metrics['protocol']})")


def with_transformers(settings: params.Params, paths: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, run: Path) -> LM:
    unpacked = modeling.fits_unpacked(paths.base, settings.model)
    with lean.without_compiler():
        if paths.adapter is None:
            model = modeling.load_base(paths.base, settings.model, unpacked)
        else:
            model = modeling.load_policy(paths.base, paths.adapter, settings.model, unpacked=unpacked)
    return Scorer(model, tokenizer, settings.evaluate.batch_tokens, settings.evaluate.batch_texts, run)


def with_vllm(settings: params.Params, paths: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, run: Path) -> LM:
    """lm-eval's own, on the same weights: a base in NF4 is written out as it is here, for vLLM would quantize it otherwise."""
    tasks.check_backend("vllm")
    from lm_eval.models.vllm_causallms import VLLM

    tokenizer.save_pretrained(run / "tokenizer")
    whole = paths.adapter is not None and (paths.adapter / "config.json").exists()
    base, adapter = (paths.adapter, None) if whole else (paths.base, paths.adapter)
    if settings.model.quantization == "nf4":
        modeling.load_base(base, settings.model).save_pretrained(run / "base")
        base = run / "base"
    more = {} if adapter is None else {"lora_local_path": str(adapter), "max_lora_rank": read_json(adapter / "adapter_config.json")["r"]}
    return VLLM(str(base), settings.model.dtype, tokenizer=str(run / "tokenizer"), seed=settings.seed, **more)


BACKENDS: dict[str, Callable[[params.Params, argparse.Namespace, PreTrainedTokenizerBase, Path], LM]] = {"transformers": with_transformers, "vllm": with_vllm}
"""What makes lm-eval's model; the last argument is a folder for what a killed run goes on from."""


def score(
    scorer: LM, name: str, benchmark: params.Benchmark, data: Path, seed: int, chat: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Run lm-eval on `data/<split>.parquet`.

    Args:
        scorer: an lm-eval model.
        data: folder with a Parquet file of the scored split, and under `fewshot/` one of the examples' if that is another.
        chat: whether prompts are the turns of a chat.

    Returns:
        The metrics; one dict a sample, in the order of the benchmark's rows; and what the scores depend on beside the model.
    """
    file = data / f"{benchmark.split}.parquet"
    indices = subset(file, name, benchmark.limit, seed)
    examples = file if benchmark.fewshot_split == benchmark.split else data / "fewshot" / f"{benchmark.fewshot_split}.parquet"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = split_by_task(name, benchmark, [file, *({examples} - {file})], indices, folder)
        stock = tasks.definitions({part.task: name for part in parts})
        for part in parts:
            check_shots(name, benchmark.num_fewshot, folder / part.task / f"{benchmark.fewshot_split}.parquet", examples == file)
            (folder / f"{part.task}.yaml").write_text(task_definition(name, part.task, stock[part.task], benchmark, folder))
        manager = TaskManager(include_path=temporary, include_defaults=False)
        loaded = manager.load([f"local_{part.task}" for part in parts])["tasks"]
        for part in parts:
            check_rows(name, part.task, len(loaded[f"local_{part.task}"].eval_docs), row_count(folder / part.task / file.name))
        if guesses := sys.modules.get("langdetect"):
            # which IFEval asks for a text's language, and which draws
            guesses.DetectorFactory.seed = seed
        results = simple_evaluate(
            scorer,
            tasks=list(loaded.values()),
            task_manager=manager,
            samples={f"local_{part.task}": list(part.rows) for part in parts},
            apply_chat_template=chat,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    samples = {part.task: results["samples"][f"local_{part.task}"] for part in parts}
    asked = [sample["arguments"] for of in samples.values() for sample in of]
    writing = asked[0][0][1] if isinstance(asked[0][0][1], dict) else None
    protocol = {
        "task": f"{benchmark.task or name} {', '.join(sorted({str(number) for number in results['versions'].values()}))}",
        "lm_eval": version("lm_eval"),
        "metric": benchmark.metric,
        "num_fewshot": benchmark.num_fewshot,
        "data": short(digest(one) for one in ([file, examples] if benchmark.num_fewshot else [file])),
        "rows": f"{len(indices)} of {row_count(file)}, {short(indices)}",
        # of a text that is written: until when, and how
        "generation": "none" if writing is None else json.dumps(writing | ({"seed": seed} if writing.get("do_sample") else {}), sort_keys=True),
        "prompts": short(asked),
    }
    return task_metrics(results, samples, name, benchmark), sample_rows(samples, parts, benchmark), protocol


def short(values: Iterable[Any]) -> str:
    """Twelve hex digits that tell these JSON values from others."""
    return xxhash.xxh3_64_hexdigest(json.dumps(list(values)).encode())[:12]


@dataclass
class Part:
    """Of a benchmark, what one task of lm-eval scores."""

    task: str
    rows: dict[int, int]
    """Among the task's rows those that are scored, each with its number in the benchmark."""


def split_by_task(name: str, benchmark: params.Benchmark, files: list[Path], indices: list[int], folder: Path) -> list[Part]:
    """Write each task's rows to `folder/<task>/<split>.parquet`. A task's name with a column in braces, `mmlu_{subject}`, stands for one task a value of it."""
    task = benchmark.task or name
    column = next((field for _, field, _, _ in Formatter().parse(task) if field), None)
    parts: dict[str, Part] = {}
    for file in files:
        table = read_parquet(file)
        if column is not None and column not in table.column_names:
            raise InputError(f"params.yaml: benchmarks.{name}.task: found {task!r}, expected a column of {file} in the braces, one of {table.column_names}")
        values = [None] * table.num_rows if column is None else table[column].to_pylist()
        wanted = set(indices) if file == files[0] else set()
        for value in sorted(set(values), key=str):
            numbers = [number for number, one in enumerate(values) if one == value]
            own = task if column is None else task.format(**{column: value})
            part = parts.setdefault(own, Part(own, {}))
            part.rows |= {place: number for place, number in enumerate(numbers) if number in wanted}
            (folder / own).mkdir(exist_ok=True)
            pq.write_table(table.take(numbers), folder / own / file.name)
    return [part for part in parts.values() if part.rows]


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
    count = row_count(file) - scored if file.exists() else 0
    if shots > count:
        raise InputError(f"params.yaml: benchmarks.{name}.num_fewshot: found {shots}, expected at most {count}, the examples of {file.parent.name} in {file.name}")


def check_rows(name: str, task: str, found: int, rows: int) -> None:
    """The task's documents are the rows, in their order: samples are told apart by their numbers."""
    if found != rows:
        raise InputError(f"params.yaml: benchmarks.{name}: {task} makes {found} documents of its {rows} rows, expected one of each; take it out of evaluate.benchmarks")


def task_definition(name: str, task: str, stock: Path, benchmark: params.Benchmark, folder: Path) -> str:
    """lm-eval's own definition, included by path, with our rows, in `folder/<task>`, in place of the Hub's. One that runs code gets our sandbox, and is not
    included, for lm-eval's would fetch its own from the Hub."""
    splits = {file.stem: str(file) for file in sorted((folder / task).glob("*.parquet"))}
    definition = {
        "task": f"local_{task}",
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits, "cache_dir": str(folder / "cache")},
        "training_split": "train" if "train" in splits and benchmark.split != "train" else None,
        "validation_split": benchmark.split if benchmark.split == "validation" else None,
        "test_split": benchmark.split if benchmark.split != "validation" else None,
        "fewshot_split": benchmark.fewshot_split if benchmark.num_fewshot else benchmark.split,
        "num_fewshot": benchmark.num_fewshot,
    }
    own = tasks.read(stock)
    runs_code = tasks.check(name, benchmark, task, own)
    if benchmark.max_new_tokens is not None:
        definition["generation_kwargs"] = {"until": own["generation_kwargs"]["until"], "do_sample": False, "max_gen_toks": benchmark.max_new_tokens}
    if not runs_code:
        return yaml.safe_dump({"include": str(stock), **definition})
    (folder / "sandboxed.py").write_text("from stages.sandbox import process_results\n")
    own = {key: own[key] for key in ("output_type", "doc_to_text", "doc_to_target", "generation_kwargs", "metadata")}
    own["filter_list"] = [{"name": "create_test", "filter": [{"function": "take_first"}]}]
    own["metric_list"] = [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}]
    return yaml.safe_dump(own | definition) + "process_results: !function sandboxed.process_results\n"


def task_metrics(results: dict[str, Any], samples: dict[str, list[dict[str, Any]]], name: str, benchmark: params.Benchmark) -> dict[str, Any]:
    """`score` and `stderr` are those of the benchmark's own metric; `metrics` lists all of the task's, as lm-eval names them. Of several tasks, each row counts alike."""
    found = results["results"][f"local_{next(iter(samples))}"]
    metrics = {}
    for key in (key for key in found if "," in key and "_stderr," not in key):
        # a metric without a standard error has a text there
        value, stderr = found[key], found[key.replace(",", "_stderr,")]
        if len(samples) > 1:
            metric, selection = key.split(",")
            values = [float(sample[metric]) for of in samples.values() for sample in of if sample["filter"] == selection]
            value, stderr = mean(values), mean_stderr(values)
        metrics[key] = {"metric": key, "value": value, "stderr": stderr if isinstance(stderr, float) else None}
    if benchmark.metric not in metrics:
        raise InputError(f"params.yaml: benchmarks.{name}.metric: found {benchmark.metric!r}, expected one of {sorted(metrics)}")
    own = metrics[benchmark.metric]
    if own["stderr"] is None:
        raise InputError(f"params.yaml: benchmarks.{name}.metric: found {benchmark.metric!r}, which has no standard error, expected one that does")
    n = sum(results["n-samples"][f"local_{task}"]["effective"] for task in samples)
    return {"score": own["value"], "stderr": own["stderr"], "n": n, "metrics": [metrics[key] for key in sorted(metrics)]}


def sample_rows(samples: dict[str, list[dict[str, Any]]], parts: list[Part], benchmark: params.Benchmark) -> list[dict[str, Any]]:
    metric, selection = benchmark.metric.split(",")
    rows = [sample_row(sample, part.rows[sample["doc_id"]], metric) for part in parts for sample in samples[part.task] if sample["filter"] == selection]
    return sorted(rows, key=lambda row: row["doc_id"])


def sample_row(sample: dict[str, Any], number: int, metric: str) -> dict[str, Any]:
    arguments = sample["arguments"]
    row = {
        "doc_id": number,
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
        raise InputError(f"row {number}: the model gives log-probs of {log_probs}, expected finite numbers; its adapter or base is damaged")
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
    for name in ("base", "data", "templates", "checkpoints", "samples", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.adapter == arguments.base:
        arguments.adapter = None
    run(params.load(), arguments.name, arguments)


if __name__ == "__main__":
    command(main)
