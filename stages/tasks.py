"""lm-eval's own task definitions, found without loading lm-eval, which takes seconds."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages import InputError, sandbox
from stages.params import Benchmark

SCORED = ("multiple_choice", "generate_until")
"""Kinds of tasks, as lm-eval names them."""


def definitions(names: Mapping[str, str]) -> dict[str, Path]:
    """The file that defines each task. Reading names alone takes a second; lm-eval's own index takes many.

    Args:
        names: tasks, each with the benchmark that names it.

    Raises:
        InputError: lm-eval has no task of a name.
    """
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    pattern = re.compile(rb"^[\"']?task[\"']?: *[\"']?(" + b"|".join(re.escape(name.encode()) for name in names) + rb")[\"']?\s*$", re.MULTILINE)
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if match := pattern.search(file.read_bytes()):
            found.setdefault(match[1].decode(), file)
    for name, benchmark in names.items():
        if name not in found:
            raise InputError(f"params.yaml: benchmarks.{benchmark}: lm-eval has no task {name}; `lm-eval ls tasks` lists them, and `task` names one that is not called as the benchmark is")
    return found


def read(definition: Path) -> dict[str, Any]:
    """A task's definition with what it includes; functions are named, not loaded."""
    own = yaml.load(definition.read_text(encoding="utf-8"), Loader)
    return read(definition.parent / own["include"]) | own if "include" in own else own


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def check(name: str, benchmark: Benchmark, task: str, definition: Mapping[str, Any]) -> bool:
    """Whether a benchmark's task, as it was read, runs code that the model writes.

    Raises:
        InputError: it cannot be scored as its entry in params.yaml says.
    """
    entry, kind = f"params.yaml: benchmarks.{name}", definition.get("output_type")
    if kind not in SCORED:
        raise InputError(f"{entry}: {task} asks for {kind}, expected one of {', '.join(SCORED)}; take it out of evaluate.benchmarks")
    if benchmark.max_new_tokens is not None and kind != "generate_until":
        raise InputError(f"{entry}.max_new_tokens: found a number, expected null for a task that does not generate")
    if definition.get("unsafe_code"):
        if task != "humaneval":
            raise InputError(f"{entry}: {task} runs code that the model writes, which is done here for humaneval alone; take it out of evaluate.benchmarks")
        if not benchmark.run_code:
            raise InputError(f"{entry}.run_code: {task} runs code that the model writes, in a sandbox; true allows it")
        sandbox.check()
        return True
    if "metric_list" in definition:
        filters = [one["name"] for one in definition.get("filter_list") or [{"name": "none"}]]
        known = sorted(f"{one['metric']},{filter}" for one in definition["metric_list"] for filter in filters)
        if benchmark.metric not in known:
            raise InputError(f"{entry}.metric: found {benchmark.metric!r}, expected one of {known}")
    return False


def check_backend(name: str) -> None:
    """Raises InputError where it is not installed."""
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError("params.yaml: evaluate.backend: found 'vllm', which is not installed; `pip install '.[vllm]'` on a machine with a GPU, or set transformers")
