"""What a stage was made with, where DVC does not look: its code and params while it runs, the versions of libraries, the commit.

DVC takes the hashes of a stage's deps and params after its command, so what was edited meanwhile would stand in dvc.lock beside results that it did not make. A stage
that DVC runs therefore hashes them as it starts, and fails if they are others before it ends. What it made is then tied to commit and versions
by a record, `provenance/<stage>.json`: its outs have there the md5 that dvc.lock gives them. A record is no out, for another commit changes it.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML

from stages import InputError
from stages.records import write_json

PIPELINE, PARAMS, LIBRARIES, RECORDS = Path("dvc.yaml"), Path("params.yaml"), Path("libraries.yaml"), Path("provenance")
MADE = ("data", "evals", "metrics", "models", "plots", "report")
"""Where stages write; deps outside are code, templates and settings."""


@dataclass(frozen=True)
class Declared:
    """A stage as dvc.yaml declares it, its matrix and values filled in."""

    code: list[Path]
    params: list[tuple[Path, str | None]]
    """File and dotted key; no key stands for the whole file."""
    outs: list[Path]


def declared(name: str) -> Declared:
    """Of a stage by DVC's name for it, such as `evaluate@dpo-gsm8k`."""
    content = load(PARAMS)
    stage, _, cell = name.partition("@")
    entry = load(PIPELINE)["stages"][stage]
    (items,) = (items for items in cells(entry.get("matrix", {}), content) if "-".join(items.values()) == cell)
    values = content | {"item": items}
    code = [path for path in map(Path, filled(entry["deps"], values)) if path.parts[0] not in MADE]
    keys: list[tuple[Path, str | None]] = []
    for one in entry.get("params", []):
        for file, names in one.items() if isinstance(one, dict) else [(str(PARAMS), [one])]:
            keys += [(Path(file), None)] if names is None else [(Path(file), key) for key in filled(names, values)]
    outs = [one if isinstance(one, str) else next(iter(one)) for kind in ("outs", "metrics", "plots") for one in entry.get(kind, [])]
    return Declared(code, keys, [Path(path) for path in filled(outs, values)])


def cells(matrix: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The values of each combination; one without any where there is no matrix."""
    lists = {key: value_of(content, values[2:-1]) if isinstance(values, str) else values for key, values in matrix.items()}
    for combination in product(*lists.values()):
        yield dict(zip(lists, combination, strict=True))


def filled(texts: list[str], values: Mapping[str, Any]) -> list[str]:
    return [re.sub(r"\$\{([^}]+)\}", lambda found: str(value_of(values, found[1])), text) for text in texts]


def value_of(content: Any, key: str | None) -> Any:
    """At a dotted key."""
    for part in key.split(".") if key else ():
        content = content[part]
    return content


def load(file: Path) -> Any:
    return YAML(typ="safe", pure=True).load(file)


class Run:
    """A stage that runs under DVC."""

    def __init__(self, name: str) -> None:
        self.name, self.declared = name, declared(name)
        self.begun = self.state()
        check_versions({key: value for key, value in self.begun.items() if key.startswith(f"{LIBRARIES}:")})

    def state(self) -> dict[str, Any]:
        """Of each file of code its md5, and the value of each key of params."""
        found: dict[str, Any] = {str(path): md5(path) if path.exists() else None for path in self.declared.code}
        contents = {file: load(file) for file, _ in self.declared.params}
        for file, key in self.declared.params:
            try:
                found[f"{file}:{key or ''}"] = value_of(contents[file], key)
            except (KeyError, TypeError):
                found[f"{file}:{key}"] = None
        return found

    def check(self) -> None:
        """Raises InputError if code or params are not as they were when the stage began."""
        now = self.state()
        changed = [name.rstrip(":") for name, value in self.begun.items() if now[name] != value]
        if changed:
            raise InputError(
                f"{', '.join(changed)}: changed while {self.name} ran, so that DVC would record it beside a result that it did not make; "
                "put it back as it was and `dvc repro` goes on from the last checkpoint, or leave it and `dvc repro` runs the stage anew"
            )

    def record(self) -> None:
        """Write what the outs were made with."""
        code = [name for name in self.begun if ":" not in name]
        write_json(
            RECORDS / f"{self.name}.json",
            {
                "stage": self.name,
                "commit": git("rev-parse", "HEAD") or "none",
                "changed_since": git("status", "--porcelain", "--no-renames", "--", *code, str(PARAMS), str(PIPELINE), str(LIBRARIES)).split()[1::2],
                "code": {name: self.begun[name] for name in code},
                "params": {name: value for name, value in self.begun.items() if name not in code},
                "versions": {"python": platform.python_version(), **{name: version(name) for name in load(LIBRARIES)}},
                "outs": {str(path): md5(path) for path in self.declared.outs if path.exists()},
            },
        )


current: Run | None = None
"""The stage that this process runs, if DVC started it."""


def begin() -> None:
    """Called as a stage starts. One that a person started is not DVC's to record.

    Raises:
        InputError: an installed library has another version than libraries.yaml.
    """
    global current
    if "DVC_STAGE" in os.environ:
        current = Run(os.environ["DVC_STAGE"])


def check() -> None:
    """Before a stage gives up what it could go on from."""
    if current is not None:
        current.check()


def end() -> None:
    """Called when a stage has succeeded."""
    if current is not None:
        current.check()
        # of several processes, the one that launched the others records
        if "REPROTUNE_LAUNCHED" not in os.environ:
            current.record()


def check_versions(expected: Mapping[str, str]) -> None:
    for key, wanted in expected.items():
        name = key.split(":")[1]
        # 2.13.0+cu130 is 2.13.0, built for some device
        if (found := version(name).split("+")[0]) != wanted:
            raise InputError(f"{LIBRARIES}: {name}: found {wanted!r}, installed is {found}; `make setup` installs what requirements.lock says, or put the installed version there")


def md5(path: Path) -> str:
    """As dvc.lock has it: of a file's content; of a folder, of the list of its files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return of_folder({file.relative_to(path).as_posix(): md5(file) for file in path.rglob("*") if file.is_file()})


def of_folder(files: Mapping[str, str]) -> str:
    """The md5 that DVC gives a folder.

    Args:
        files: by path in the folder, the md5 of each.
    """
    entries = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()


def record_of(path: str, found: str, stage: str) -> dict[str, Any] | None:
    """The record of a stage, if what it made at this path has this md5."""
    file = RECORDS / f"{stage}.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"outs": {}}
    return record if record["outs"].get(PurePosixPath(path).as_posix()) == found else None
