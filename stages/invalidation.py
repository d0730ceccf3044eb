"""Which stages a change makes stale: of a parameter, of a file of code, of a library's version.

    python -m stages.invalidation dpo.beta stages/scoring.py     of these alone
    python -m stages.invalidation > docs/invalidation.md         the table of all

Taken from dvc.yaml: the stages that declare it, and those behind them. What stands behind reruns only if what is before it came out otherwise.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx
from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import Stage

from stages import InputError, command, first_line, params, provenance

CHECK = "check_params"
"""Reads every parameter, and makes the same whatever it reads, so that nothing behind it reruns for that."""
HEADER = """# What a change makes stale

Made from `dvc.yaml` with `python -m stages.invalidation > docs/invalidation.md`; `python -m stages.invalidation dpo.beta` prints it for one change, and a test holds each
row against DVC itself. On the right are the stages that read what is named on the left, and in brackets those behind them, which rerun only if what
they read came out otherwise: a stage that makes the same bytes again stops the chain. `check_params` reruns, in a second, whenever a value changes.

`<b>` stands for any of the benchmarks, `*` for all benchmarks or models. Not in the table, because nothing reruns: a comment, the order of keys or how a number is written in `params.yaml`; the number of GPUs,
`REPROTUNE_PROCESSES` and `REPROTUNE_CHECKPOINT_SECONDS`; other packages; tests, docs, perf, recipes, and modules that no stage imports.

A name added to `evaluate.benchmarks` adds its `fetch_benchmark` and three cells of `evaluate`; those of the others stay.
"""


class Pipeline:
    """DVC's stages by name, and what each reads."""

    def __init__(self, repo: Repo) -> None:
        self.stages: dict[str, Stage] = {stage.addressing: stage for stage in repo.index.stages}
        self.graph = repo.index.graph

    def reading(self, what: str) -> set[str]:
        """The stages that declare a parameter (dotted key), a library (`libraries.yaml:torch`) or a file."""
        return {name for name, own in self.declared.items() if any(covers(one, what) for one in own)}

    def behind(self, names: Iterable[str]) -> set[str]:
        """The stages that depend on what these make."""
        found: set[str] = set()
        for name in set(names) - {CHECK}:
            # an edge leads from a stage to the one it depends on
            found |= {stage.addressing for stage in networkx.ancestors(self.graph, self.stages[name])}
        return found - set(names)

    def texts(self, reading: set[str], benchmarks: list[str], own: str | None = None) -> tuple[str, str]:
        """Stages that read a change, and those behind them, each as text in the pipeline's order."""
        behind = self.behind(reading)
        # the other cells behind a benchmark's own are all of that model
        behind |= {name for name in reading if any(one.split("-")[0] == name.split("-")[0] for one in behind if "@" in one)}
        return tuple(summary(filter(found.__contains__, self.stages), benchmarks, own) for found in (reading, behind))

    @cached_property
    def declared(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, stage in self.stages.items():
            found[name] = own = []
            for dep in stage.deps:
                if not isinstance(dep, ParamsDependency):
                    own.append(dep.def_path)
                elif name != CHECK:
                    prefix = "" if dep.def_path == str(provenance.PARAMS) else f"{dep.def_path}:"
                    own += [f"{prefix}{key}" for key in dep.params]
        return found

    def code(self) -> list[str]:
        """Files and folders that no stage makes."""
        return sorted({one for name in self.stages for one in self.declared[name] if "/" in one and one.split("/")[0] not in provenance.MADE})


def covers(declared: str, what: str) -> bool:
    """Whether a stage that declares the one reads the other."""
    if declared == what:
        return True
    separator = "/" if "/" in what else "."
    return what.startswith(declared + separator) or ("/" not in what and declared.startswith(what + separator))


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a params section; a source is one, for it is changed as one."""
    if isinstance(value, params.Section) and "kind" not in type(value).model_fields:
        for name in type(value).model_fields:
            yield from keys(getattr(value, name), f"{prefix}{name}.")
    elif isinstance(value, dict) and value:
        for name, one in value.items():
            yield from keys(one, f"{prefix}{name}.")
    else:
        yield prefix.removesuffix(".")


def is_key(settings: params.Params, what: str) -> bool:
    """Whether params.yaml has a value, or a section, at this dotted key."""
    try:
        provenance.value_of(settings.model_dump(), what)
    except (KeyError, TypeError):
        return False
    return True


def rows(pipeline: Pipeline, settings: params.Params) -> dict[tuple[str, str], list[str]]:
    """What is changed, by the stages that read it and those behind, each as text."""
    names = settings.evaluate.benchmarks
    changes = [*keys(settings), *(f"{provenance.LIBRARIES}:{name}" for name in provenance.load(provenance.LIBRARIES)), *pipeline.code()]
    found: dict[tuple[str, str], list[str]] = {}
    for change in changes:
        reading = pipeline.reading(change)
        own = next((name for name in names if f".{name}." in f".{change}."), None)
        texts = pipeline.texts(reading, names, own)
        shown = change if own is None else change.replace(own, "<b>")
        if shown not in found.setdefault(texts, []):
            found[texts].append(shown)
    return found


def summary(stages: Iterable[str], names: list[str], own: str | None) -> str:
    """Stages as text: cells of all models or of all benchmarks as one.

    Args:
        own: the benchmark whose parameter is changed.
    """
    cells: dict[str, set[str]] = {}
    for name in stages:
        stage, _, cell = name.partition("@")
        cells.setdefault(stage, set()).add(cell)
    return ", ".join(text for stage, found in cells.items() for text in of_stage(stage, found, names, own))


def of_stage(stage: str, cells: set[str], names: list[str], own: str | None) -> list[str]:
    if cells == {""}:
        return [stage]
    shown = {name: "<b>" if name == own else name for name in names}
    if stage != "evaluate":
        return [stage] if cells == set(names) else [f"{stage}@{shown[cell]}" for cell in sorted(cells)]
    by_model = {model: {cell.partition("-")[2] for cell in cells if cell.startswith(f"{model}-")} for model in ("base", "sft", "dpo")}
    if all(of == set(names) for of in by_model.values()):
        return [stage]
    if len(benchmarks := set.union(*by_model.values())) == 1 and all(by_model.values()):
        return [f"{stage}@*-{shown[benchmarks.pop()]}"]
    return [f"{stage}@{model}-{part}" for model, of in by_model.items() for part in (["*"] if of == set(names) else sorted(shown[name] for name in of))]


def table(found: Mapping[tuple[str, str], list[str]]) -> str:
    lines = ["| changed | reruns |", "| --- | --- |"]
    for (reading, behind), changes in found.items():
        lines.append(f"| {', '.join(f'`{change}`' for change in changes)} | {reading}{f' ({behind})' if behind else ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changed", nargs="*", help="a dotted key of params.yaml, a file, or libraries.yaml:NAME; without, the table of all")
    changed = parser.parse_args().changed
    settings = params.load()
    with Repo() as repo:
        try:
            pipeline = Pipeline(repo)
        except DvcException as error:
            raise InputError(f"dvc.yaml or dvc.lock cannot be read ({first_line(error)}); `git checkout dvc.lock` brings the last one back") from error
    if not changed:
        print(f"{HEADER}\n{table(rows(pipeline, settings))}", end="")
    for what in changed:
        what = str(Path(what)) if "/" in what else what
        reading = pipeline.reading(what)
        if not (reading if "/" in what or ":" in what else is_key(settings, what)):
            raise InputError(f"found {what!r}, expected a key of params.yaml such as dpo.beta, libraries.yaml:torch, or a file that a stage of dvc.yaml depends on")
        own, behind = pipeline.texts(reading, settings.evaluate.benchmarks)
        print(f"{what}: {own or 'nothing'}" + (f"; behind, if what those make is another: {behind}" if behind else ""))


if __name__ == "__main__":
    command(main)
