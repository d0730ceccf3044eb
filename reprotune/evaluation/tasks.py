"""lm-eval's task definitions, found and checked without loading lm-eval, which takes seconds."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reprotune.errors import InputError
from reprotune.evaluation import sandbox
from reprotune.params import Benchmark, Params

SCORED = ("multiple_choice", "generate_until")
"""The kinds of tasks that can be scored, by lm-eval's `output_type`."""


def check_benchmarks(settings: Params) -> None:
    """Check that lm-eval has a task for each benchmark, and that it can be scored as params.yaml says.

    Raises:
        InputError: naming the benchmark's key.
    """
    named = {name: settings.benchmarks[name].task or name for name in settings.evaluate.benchmarks}
    # a name with a column in braces stands for tasks that only the rows tell
    files = definitions({task: name for name, task in named.items() if "{" not in task})
    for name, task in named.items():
        if task in files:
            check(name, settings.benchmarks[name], task, read(files[task]))
    check_backend(settings.evaluate.backend)


def definitions(tasks: Mapping[str, str]) -> dict[str, Path]:
    """The file that defines each task. A search for the names takes a second, lm-eval's own index many.

    Args:
        tasks: the benchmark that names each task.

    Raises:
        InputError: lm-eval has no such task.
    """
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    names = b"|".join(re.escape(task.encode()) for task in tasks)
    pattern = re.compile(rb"^[\"']?task[\"']?: *[\"']?(" + names + rb")[\"']?\s*$", re.MULTILINE)
    files: dict[str, Path] = {}
    for file in sorted((Path(spec.origin).parent / "tasks").rglob("*.yaml")):
        if match := pattern.search(file.read_bytes()):
            files.setdefault(match[1].decode(), file)
    for task, benchmark in tasks.items():
        if task not in files:
            raise InputError(
                f"params.yaml: benchmarks.{benchmark}: lm-eval has no task {task}; `lm-eval ls tasks` lists "
                "them, and `task` names one that is not called as the benchmark is"
            )
    return files


def read(file: Path) -> dict[str, Any]:
    """A task's definition with what it includes; functions are named, not loaded."""
    definition = yaml.load(file.read_text(encoding="utf-8"), Loader)
    if "include" in definition:
        return read(file.parent / definition["include"]) | definition
    return definition


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as a text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def check(name: str, benchmark: Benchmark, task: str, definition: Mapping[str, Any]) -> bool:
    """Whether a benchmark's task runs code that the model writes.

    Raises:
        InputError: the task cannot be scored as the benchmark's entry in params.yaml says.
    """
    entry, kind = f"params.yaml: benchmarks.{name}", definition.get("output_type")
    if kind not in SCORED:
        raise InputError(
            f"{entry}: {task} asks for {kind}, expected one of {', '.join(SCORED)}; take it out of "
            "evaluate.benchmarks"
        )
    if benchmark.max_new_tokens is not None and kind != "generate_until":
        raise InputError(
            f"{entry}.max_new_tokens: found a number, expected null for a task that does not generate"
        )
    if definition.get("unsafe_code"):
        if task != "humaneval":
            raise InputError(
                f"{entry}: {task} runs code that the model writes, which only humaneval can do here; take it "
                "out of evaluate.benchmarks"
            )
        if not benchmark.run_code:
            raise InputError(
                f"{entry}.run_code: {task} runs code that the model writes, in a sandbox; true allows it"
            )
        sandbox.check()
        return True
    if "metric_list" in definition:
        filters = [item["name"] for item in definition.get("filter_list") or [{"name": "none"}]]
        metrics = [item["metric"] for item in definition["metric_list"]]
        known = sorted(f"{metric},{selection}" for metric in metrics for selection in filters)
        if benchmark.metric not in known:
            raise InputError(f"{entry}.metric: found {benchmark.metric!r}, expected one of {known}")
    return False


def check_backend(name: str) -> None:
    """Raise InputError if the backend is not installed."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError(
            "params.yaml: evaluate.backend: found 'vllm', which is not installed; `pip install '.[vllm]'` on "
            "a machine with a GPU, or set transformers"
        )
