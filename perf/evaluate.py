"""Compare scoring and generation with lm-eval's HFLM at the best of several batch sizes.

    python -m perf.evaluate [--tasks hellaswag:0:40 arc_challenge:25:16 ...] [--batches 1 4 16]
                            [--quantization nf4] [--repeats 3]

A task is name:shots:rows. Needs models/base (`dvc repro fetch_model`) and a quiet machine. Rows, model and
precision are the same, and each side runs in a process of its own. A benchmark of several tasks, such as
MMLU, gives the rows of one task, which share their examples. Seconds are those of answering the requests, the
median of alternating runs: without loading the model, building prompts and counting.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from string import Formatter

import pyarrow.compute as pc
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from perf.beside import ROOT, measured
from reprotune.data import benchmarks
from reprotune.params import Benchmark
from reprotune.records import read_parquet

TASKS = [
    "hellaswag:0:40",
    "arc_challenge:25:16",
    "winogrande:5:40",
    "commonsense_qa:7:48",
    "mmlu:5:40",
    "gsm8k:5:8",
]


def benchmark(name: str) -> Benchmark:
    """Of params.yaml, or what docs/guides/benchmarks.md gives."""
    (more,) = re.findall(
        r"```yaml\n(benchmarks:.*?)```", (ROOT / "docs/guides/benchmarks.md").read_text(), re.DOTALL
    )
    entries = (
        YAML(typ="safe").load(more)["benchmarks"] | YAML(typ="safe").load(ROOT / "params.yaml")["benchmarks"]
    )
    return Benchmark.model_validate(entries[name])


def fetch(name: str, folder: Path) -> None:
    own = benchmark(name)
    benchmarks.run(name, own, folder)
    if own.task and (column := next(field for _, field, _, _ in Formatter().parse(own.task) if field)):
        for file in folder.rglob("*.parquet"):
            table = read_parquet(file)
            pq.write_table(table.filter(pc.equal(table[column], min(table[column].to_pylist()))), file)


def answers(arguments: argparse.Namespace) -> dict:
    """Seconds, and what the model answered: log-probs of each row's choices, or the text."""
    from lm_eval.models.huggingface import HFLM

    from reprotune import params_file
    from reprotune.data.templates import load_tokenizer
    from reprotune.evaluation import harness, lm_eval_model
    from reprotune.model import determinism, loading

    settings = params_file.load(ROOT / "params.yaml")
    model_settings = settings.model.model_copy(
        update={"quantization": arguments.quantization, "dtype": arguments.dtype}
    )
    determinism.start(settings.seed, warn_only=True)
    tokenizer = load_tokenizer(ROOT / "models/base", ROOT / "templates/chatml.jinja")
    model = loading.load_base(ROOT / "models/base", model_settings, dequantized=arguments.side == "ours")
    model.config.use_cache = True
    if arguments.side == "ours":
        scorer = lm_eval_model.Scorer(
            model, tokenizer, settings.evaluate.batch_tokens, settings.evaluate.batch_texts
        )
    else:
        scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=int(arguments.side))
    took = []
    for name in ("loglikelihood", "generate_until"):
        setattr(scorer, name, timed(getattr(scorer, name), took))
    name, shots, rows = arguments.task.split(":")
    own = benchmark(name).model_copy(
        update={
            "num_fewshot": int(shots),
            "limit": int(rows),
            "max_new_tokens": arguments.new_tokens if name == "gsm8k" else None,
        }
    )
    _, samples, _ = harness.score(scorer, name, own, arguments.data, settings.seed)
    return {
        "seconds": sum(took),
        "answers": [row["generation"] if row["log_probs"] is None else row["log_probs"] for row in samples],
        "predicted": [row["predicted"] for row in samples],
    }


def timed(function, took: list[float]):
    def call(*given, **named):
        begin = time.monotonic()
        found = function(*given, **named)
        took.append(time.monotonic() - begin)
        return found

    return call


def difference(one: dict, other: dict) -> str:
    same = sum(a == b for a, b in zip(one["predicted"], other["predicted"], strict=True))
    predicted = f"{same} of {len(one['predicted'])} predictions the same"
    if isinstance(one["answers"][0], str):
        equal = sum(a == b for a, b in zip(one["answers"], other["answers"], strict=True))
        return f"{equal} texts and {predicted}"
    largest = max(
        abs(a - b)
        for row, theirs in zip(one["answers"], other["answers"], strict=True)
        for a, b in zip(row, theirs, strict=True)
    )
    return f"largest difference of a log-prob {largest:.1e}, {predicted}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--new_tokens", type=int, default=256, help="of a generated text, at most")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="nf4")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    for hidden in ("--task", "--side"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(answers(arguments)))
        return
    flags = [f"--{key}={getattr(arguments, key)}" for key in ("dtype", "quantization", "new_tokens")]
    with tempfile.TemporaryDirectory() as name:
        for task in arguments.tasks:
            data = Path(name) / task.split(":")[0]
            fetch(data.name, data)
            found: dict[str, list[dict]] = {side: [] for side in ["ours", *map(str, arguments.batches)]}
            for _ in range(arguments.repeats):
                for side, runs in found.items():
                    runs.append(
                        measured(
                            "perf.evaluate",
                            [*flags, f"--task={task}", f"--side={side}", f"--data={data}"],
                            Path(name),
                        )
                    )
                    print(
                        f"{task} {side:>4} {runs[-1]['seconds']:8.1f} s {runs[-1]['peak_mib']:6.0f} MiB",
                        flush=True,
                    )
            seconds = {
                side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()
            }
            best = min(map(str, arguments.batches), key=seconds.get)
            print(
                f"{task}: {seconds['ours']:.1f} s is {seconds['ours'] / seconds[best]:.3f} of HFLM's "
                f"{seconds[best]:.1f} s at batch size {best}; {difference(found['ours'][0], found[best][0])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
