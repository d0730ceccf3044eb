"""lm-eval's own task definitions, found without loading lm-eval, which takes seconds."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stages import InputError


def definitions(names: Sequence[str]) -> dict[str, Path]:
    """The file that defines each task. Reading names alone takes a second; lm-eval's own index takes many.

    Raises:
        InputError: lm-eval has no task of a name.
    """
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    pattern = re.compile(rb"^task: *[\"']?(" + b"|".join(re.escape(name.encode()) for name in names) + rb")[\"']?\s*$", re.MULTILINE)
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if match := pattern.search(file.read_bytes()):
            found.setdefault(match[1].decode(), file)
    for name in names:
        if name not in found:
            raise InputError(f"params.yaml: benchmarks.{name}: lm-eval has no task of this name; `lm-eval ls tasks` lists them")
    return found


def generation(name: str, definition: Path) -> dict[str, Any]:
    """How the task generates.

    Raises:
        InputError: it does not.
    """
    found = yaml.load(definition.read_text(encoding="utf-8"), yaml.BaseLoader).get("generation_kwargs")
    if found is None:
        raise InputError(f"params.yaml: benchmarks.{name}.max_new_tokens: found a number, expected null for a task that does not generate")
    return found
