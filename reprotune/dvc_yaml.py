"""Stages as dvc.yaml declares them, with the values of `matrix` and `foreach` filled in."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from reprotune.errors import InputError, first_line

PIPELINE, PARAMS, CODE = Path("dvc.yaml"), Path("params.yaml"), Path("code.yaml")
MADE = ("data", "evals", "metrics", "models", "plots", "report")
"""The folders that stages write to; a dep outside of them is code, a template or a config."""


@dataclass(frozen=True)
class Declared:
    """What a stage reads and writes."""

    files: list[Path]
    """Deps that no stage makes."""
    folders: list[Path]
    """Deps in MADE."""
    params: list[tuple[Path, str | None]]
    """File and dotted key; no key stands for the whole file."""
    outs: list[Path]


def declared(name: str) -> Declared:
    """Look up a stage by DVC's name for it, such as `evaluate@dpo-gsm8k`.

    Raises:
        InputError: dvc.yaml has no such stage, or params.yaml lacks a value for it.
    """
    stage = expanded(only=name.partition("@")[0]).get(name)
    if stage is None:
        raise InputError(
            f"{PIPELINE}: found no stage {name}, which DVC runs: it, or the list that it is one of, changed "
            "since; `dvc repro` runs what is there now"
        )
    return stage


def all_stages() -> dict[str, Declared]:
    """Every stage by DVC's name for it; raises InputError where params.yaml lacks a value for one."""
    return expanded()


def expanded(only: str | None = None) -> dict[str, Declared]:
    """The stages of all entries, or of one."""
    content, pipeline = load(PARAMS) or {}, load(PIPELINE) or {"stages": {}}
    try:
        return {
            "@".join(filter(None, (name, instance))): filled_in(entry.get("do", entry), content | values)
            for name, entry in pipeline["stages"].items()
            if only in (None, name)
            for instance, values in instances(entry, content)
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{PARAMS}: it lacks a value that {PIPELINE} takes from it ({first_line(error)}), or is being "
            "saved; correct it, then `dvc repro` goes on"
        ) from error


def filled_in(entry: Mapping[str, Any], values: Mapping[str, Any]) -> Declared:
    deps = [Path(path) for path in filled(entry.get("deps", []), values)]
    outs = [
        out if isinstance(out, str) else next(iter(out))
        for kind in ("outs", "metrics", "plots")
        for out in entry.get(kind, [])
    ]
    return Declared(
        files=[path for path in deps if path.parts[0] not in MADE],
        folders=[path for path in deps if path.parts[0] in MADE],
        params=list(declared_params(entry, values)),
        outs=[Path(path) for path in filled(outs, values)],
    )


def declared_params(entry: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[Path, str | None]]:
    for declared in entry.get("params", []):
        for file, keys in (declared if isinstance(declared, dict) else {str(PARAMS): [declared]}).items():
            if keys is None:
                yield Path(file), None
            else:
                yield from ((Path(file), key) for key in filled(keys, values))


def instances(entry: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stages that an entry stands for: what their names have behind `@`, and the values of their keys."""
    if "foreach" in entry:
        for key, item in value_of(content, entry["foreach"][2:-1]).items():
            yield key, {"key": key, "item": item}
        return
    lists = {
        key: value_of(content, values[2:-1]) if isinstance(values, str) else values
        for key, values in entry.get("matrix", {}).items()
    }
    for combination in product(*lists.values()):
        yield "-".join(map(str, combination)), {"item": dict(zip(lists, combination, strict=True))}


def filled(texts: list[str], values: Mapping[str, Any]) -> list[str]:
    """The texts with the values of their `${key}`s."""
    return [re.sub(r"\$\{([^}]+)\}", lambda match: str(value_of(values, match[1])), text) for text in texts]


def value_of(content: Any, key: str | None) -> Any:
    """The value at a dotted key; all of the content without one."""
    for part in key.split(".") if key else ():
        content = content[part]
    return content


def load(file: Path) -> Any:
    """A YAML file's content; None if it cannot be read, as while it is being saved."""
    try:
        return YAML(typ="safe", pure=True).load(file)
    except (YAMLError, ValueError, OSError):
        return None
