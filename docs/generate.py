"""Write docs/reference, the pages that follow from the code: `python docs/generate.py`."""

import argparse
import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import params_page
from dvc.repo import Repo
from markdown_parts import code, table
from ruamel.yaml import YAML

from reprotune import cli, fingerprints, params, params_file
from reprotune.data import benchmarks, formats
from reprotune.pipeline.plan import texts
from reprotune.pipeline.reads import Pipeline

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Written by `python docs/generate.py`. -->"

COMMANDS_HEAD = """# Commands

DVC runs the pipeline: `dvc repro`, `dvc exp run`, `dvc metrics diff`, `dvc push`. `reprotune` answers what
DVC does not know about a run. Run it in the folder of `dvc.yaml`, with `.venv` active.
`python -m reprotune` is the same. `reprotune --print-completion bash` prints a completion script.
"""

ENVIRONMENT_HEAD = """## Environment variables

None of these makes a stage stale, and none changes a result beyond rounding.
"""
ENVIRONMENT = (
    ("REPROTUNE_CHECKPOINT_SECONDS", "seconds between two checkpoints of a stage; 600 if unset"),
    ("REPROTUNE_PROCESSES", "processes of a training stage, or cells at once, without GPUs; 1 if unset"),
    ("HF_TOKEN", "token for gated repositories on the Hub; it is written nowhere"),
    ("HF_ENDPOINT", "a server to use in place of the Hub"),
)

STAGES_HEAD = """# Stages

The stages of [dvc.yaml](../../dvc.yaml), in the order of that file. `<benchmark>` stands for each name in
`evaluate.benchmarks`, `<model>` for `base`, `sft` and `dpo`, `<key>` for the name of a source. Each stage
also reads its entry of `code.yaml`, the fingerprint of its code.
"""

FORMATS_HEAD = """# Formats

How each `format` of a source reads a row. A row of another shape is invalid. So is a row with a key that the
format has no place for, unless the source names it under `ignore`.
[Your own data](../guides/own-data.md#what-a-row-may-say) says what else a row may have.
"""

INVALIDATION_HEAD = """# What a change makes stale

`reprotune plan dpo.beta` prints this for one change, and `reprotune plan` lists what is stale now. The right
column names the stages that read the change. In brackets are the stages behind them, which rerun only if what
they read comes out different: a stage that makes the same bytes again stops the chain. `<b>` is any
benchmark, `*` all benchmarks or all models.

- **Code** is tracked by its meaning. The stage `code` hashes the syntax trees of the modules that each stage
  imports and writes one fingerprint a stage to `code.yaml`. A comment, a docstring or formatting makes only
  `code` stale.
- **Libraries** are tracked by `requirements.lock`. A fingerprint covers the pinned version of each library in
  the table that the stage imports. `report` prints versions, so every change of `requirements.lock` also
  reruns `report`.
- **`check_params`** reruns, in a second, whenever a value of `params.yaml` changes.
- **A name added to `evaluate.benchmarks`** adds its `fetch_benchmark` and three cells of `evaluate`. Other
  cells stay.
- **Nothing** reruns after a change of comments, the order of keys or the notation of numbers in
  `params.yaml`. The same holds for the number of GPUs and the
  [environment variables](commands.md#environment-variables), for tests, docs, perf and recipes, and for
  modules that no stage imports.
"""


def commands_page() -> str:
    actions = cli.parser()._actions
    commands = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [
        (code(f"make {name}"), text)
        for name, text in re.findall(r"^# make (\S+) +(.+)$", makefile, re.MULTILINE)
    ]
    return "\n".join(
        [
            COMMANDS_HEAD,
            *(command_part(name, parser) for name, parser in commands.choices.items()),
            f"## Make\n\n{table(('target', 'what it does'), targets)}",
            ENVIRONMENT_HEAD,
            table(("variable", "meaning"), [(code(name), text) for name, text in ENVIRONMENT]),
        ]
    )


def command_part(name: str, parser: argparse.ArgumentParser) -> str:
    """Usage and arguments. argparse's own help differs between versions of Python."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    usage = " ".join([f"reprotune {name}", *map(argument, actions)])
    rows = [(code(argument(action).strip("[]")), (action.help or "") % vars(action)) for action in actions]
    arguments = table(("argument", "meaning"), rows)
    return f"## {name}\n\n{parser.description}\n\n```text\n{usage}\n```\n\n{arguments}"


def argument(action: argparse.Action) -> str:
    value = "|".join(action.choices) if action.choices else action.metavar or action.dest.upper()
    if not action.option_strings:
        return f"[{value} ...]" if action.nargs == "*" else str(value)
    option = action.option_strings[-1] + ("" if action.nargs == 0 else f" {value}")
    return option if action.required else f"[{option}]"


def stages_page() -> str:
    pipeline = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    return "\n".join([STAGES_HEAD, *(stage_part(*item) for item in pipeline["stages"].items())])


def stage_part(name: str, entry: Mapping[str, Any]) -> str:
    each = f" One run for each {' and '.join(entry['matrix'])}." if "matrix" in entry else ""
    if "foreach" in entry:
        each = f" One run for each of `{entry['foreach'][2:-1]}`."
        entry = entry["do"]
    listed = {
        "files": entries(entry.get("deps", [])),
        "params": [key for key in entries(entry.get("params", [])) if key != "code.yaml"],
        "writes": [out for kind in ("outs", "metrics", "plots") for out in entries(entry.get(kind, []))],
    }
    lines = [f"- {kind}: {', '.join(map(code, names))}\n" for kind, names in listed.items() if names]
    return f"## {name}\n\n{entry['desc']}.{each}\n\n{''.join(lines)}"


def entries(listed: Iterable[str | Mapping[str, Any]]) -> list[str]:
    """A list of dvc.yaml without the entries' settings, and with `<key>` for the value of a key."""
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in listed]
    return [re.sub(r"\$\{(?:item\.)?([^}]+)\}", r"<\1>", name) for name in names]


def formats_page() -> str:
    parts = {
        "Instructions: `data.sft.sources.<name>.format`": documented(formats.SFT_FORMATS),
        "Preferences: `data.preferences.sources.<name>.format`": documented(formats.PREFERENCE_FORMATS),
        "Benchmarks: `benchmarks.<name>.format`": benchmark_formats(),
    }
    header = ("format", "a row")
    return "\n".join(
        [FORMATS_HEAD, *(f"## {title}\n\n{table(header, rows)}" for title, rows in parts.items())]
    )


def documented(adapters: Mapping[str, Callable]) -> Iterator[tuple[str, str]]:
    for name, adapter in adapters.items():
        yield code(name), shape_in_code(inspect.getdoc(adapter) or "")


def benchmark_formats() -> Iterator[tuple[str, str]]:
    """READERS holds functions, and calls that make a reader of the columns they name."""
    tree = ast.parse(Path(benchmarks.__file__).read_text(encoding="utf-8"))
    docs = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assigned = {ast.unparse(node.target): node.value for node in tree.body if isinstance(node, ast.AnnAssign)}
    readers = assigned["READERS"]
    assert isinstance(readers, ast.Dict)
    for key, reader in zip(readers.keys, readers.values, strict=True):
        assert key is not None
        if isinstance(reader, ast.Call):
            columns = ", ".join(ast.literal_eval(column) for column in reader.args)
            doc = f"{{{columns}}}. {docs[ast.unparse(reader.func)]}"
        else:
            doc = docs[ast.unparse(reader)] or ""
        yield code(ast.literal_eval(key)), shape_in_code(doc)


def shape_in_code(doc: str) -> str:
    """A docstring in one line. What stands in braces, at most two deep, is the shape of a row."""
    return re.sub(r"\w*\{(?:[^{}]|\{[^{}]*\})*\}", lambda shape: code(shape[0]), " ".join(doc.split()))


def invalidation_page() -> str:
    with Repo(str(ROOT)) as repo:
        groups = changes_by_stages(Pipeline(repo), params_file.load(ROOT / "params.yaml"))
    rows = [
        (", ".join(map(code, changes)), reading + (f" ({behind})" if behind else ""))
        for (reading, behind), changes in groups.items()
    ]
    return f"{INVALIDATION_HEAD}\n{table(('changed', 'reruns'), rows)}"


def changes_by_stages(pipeline: Pipeline, settings: params.Params) -> dict[tuple[str, str], list[str]]:
    """Every change, by the text of the stages that read it and of those behind them."""
    names = settings.evaluate.benchmarks
    modules = sorted(set().union(*pipeline.code.values()))
    groups: dict[tuple[str, str], list[str]] = {}
    for change in (*keys(settings), *pipeline.files(), *fingerprints.LIBRARIES, *modules):
        benchmark = next((name for name in names if f".{name}." in f".{change}."), None)
        shown = change if benchmark is None else change.replace(benchmark, "<b>")
        group = groups.setdefault(texts(pipeline, pipeline.reading(change), benchmark), [])
        if shown not in group:
            group.append(shown)
    return groups


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a params section. A source is one key, for it is changed as a whole."""
    if isinstance(value, params.Section) and "kind" not in type(value).model_fields:
        for name in type(value).model_fields:
            yield from keys(getattr(value, name), f"{prefix}{name}.")
    elif isinstance(value, dict) and value:
        for name, item in value.items():
            yield from keys(item, f"{prefix}{name}.")
    else:
        yield prefix.removesuffix(".")


def pages() -> dict[str, str]:
    """The content of each page, by its file name."""
    contents = {
        "params.md": params_page.page(),
        "commands.md": commands_page(),
        "stages.md": stages_page(),
        "formats.md": formats_page(),
        "invalidation.md": invalidation_page(),
    }
    return {name: f"{NOTE}\n\n{content.rstrip()}\n" for name, content in contents.items()}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, content in pages().items():
        (REFERENCE / name).write_text(content, encoding="utf-8")
        print(f"docs/reference/{name}")
