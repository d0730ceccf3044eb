"""What a stage was made with, where DVC does not look: its code and params while it runs, the versions of libraries, the commit.

DVC takes the hashes of a stage's deps and params after its command, so what was edited meanwhile would stand in dvc.lock beside results that it did not make. A stage
that DVC runs therefore hashes them as it starts, and fails if they are others before it ends; what it could go on from is given up last. What it made is then tied to commit and versions
by a record, `provenance/<stage>.json`: its outs have there the md5 that dvc.lock gives them. A record is no out, for another commit changes it.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages import STARTED, InputError
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
    """Of a stage by DVC's name for it, such as `evaluate@dpo-gsm8k`.

    Raises:
        InputError: there is none of this name.
    """
    content, stages = load(PARAMS) or {}, (load(PIPELINE) or {"stages": {}})["stages"]
    stage, _, cell = name.partition("@")
    entry = stages.get(stage)
    found = [items for items in cells(entry.get("matrix", {}), content) if "-".join(map(str, items.values())) == cell] if entry else []
    if not found:
        raise InputError(f"{PIPELINE}: found no stage {name}, which DVC runs: it, or the values of its matrix, changed since; `dvc repro` runs what is there now")
    values = content | {"item": found[0]}
    code = [path for path in map(Path, filled(entry.get("deps", []), values)) if path.parts[0] not in MADE]
    keys: list[tuple[Path, str | None]] = []
    for one in entry.get("params", []):
        for file, names in one.items() if isinstance(one, dict) else [(str(PARAMS), [one])]:
            keys += [(Path(file), None)] if names is None else [(Path(file), key) for key in filled(names, values)]
    outs = [one if isinstance(one, str) else next(iter(one)) for kind in ("outs", "metrics", "plots") for one in entry.get(kind, [])]
    return Declared(code, keys, [Path(path) for path in filled(outs, values)])


def cells(matrix: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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
    """None of a file that cannot be read, as of one that is being saved."""
    try:
        return YAML(typ="safe", pure=True).load(file)
    except (YAMLError, ValueError, OSError):
        return None


class Run:
    """A stage that runs under DVC."""

    def __init__(self, name: str) -> None:
        self.name, self.declared = name, declared(name)
        late = [str(path) for path in self.declared.code if path.exists() and path.stat().st_mtime > STARTED]
        if late:
            raise InputError(f"{', '.join(late)}: changed while {name} was loading it; `dvc repro` starts it again")
        self.begun = self.state()
        self.then: list[Callable[[], None]] = []
        check_versions({key: value for key, value in self.begun.items() if key.startswith(f"{LIBRARIES}:")})

    def state(self) -> dict[str, Any]:
        """Of each file of code its md5, and the value of each key of params."""
        found: dict[str, Any] = {str(path): md5(path) if path.exists() else None for path in self.declared.code}
        contents = {file: load(file) for file in {file for file, _ in self.declared.params}}
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
                "commit": git("rev-parse", "HEAD"),
                "changed_since": changed_since([*code, str(PARAMS), str(PIPELINE), str(LIBRARIES)]),
                "code": {name: self.begun[name] for name in code},
                "params": {name: value for name, value in self.begun.items() if name not in code},
                "versions": {"python": platform.python_version(), **{name: version(name) for name in load(LIBRARIES)}},
                "outs": {str(path): md5(path) for path in self.declared.outs if path.exists()},
            },
        )


current: Run | None = None
"""The stage that this process runs, if DVC started it."""
LAUNCHED, BEGUN = "REPROTUNE_LAUNCHED", "REPROTUNE_BEGUN"
"""In the environment of processes that a launcher started, and what it was with code and params when that began."""


def begin() -> None:
    """Called as a stage starts. One that a person started is not DVC's to record.

    Raises:
        InputError: code changed since it was loaded, or an installed library has another version than libraries.yaml.
    """
    global current
    if "DVC_STAGE" not in os.environ:
        return
    # behind dvc.yaml's path, where dvc was called in another folder
    current = Run(os.environ["DVC_STAGE"].rpartition(":")[2])
    state = hashlib.sha256(json.dumps(current.begun, sort_keys=True).encode()).hexdigest()
    if LAUNCHED in os.environ and os.environ.get(BEGUN, state) != state:
        raise InputError(f"code or params of {current.name} changed while its processes were started; `dvc repro` starts it again")
    os.environ[BEGUN] = state


def when_done(action: Callable[[], None]) -> None:
    """Once nothing more can fail: what removes that which a stage could go on from."""
    if current is None:
        action()
    else:
        current.check()
        current.then.append(action)


def end() -> None:
    """Called when a stage has succeeded."""
    if current is not None:
        current.check()
        # of several processes, the one that launched the others records
        if LAUNCHED not in os.environ:
            current.record()
        for action in current.then:
            action()


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


def git(*arguments: str) -> str | None:
    """What it prints; None where there is no git, or no repository."""
    try:
        result = subprocess.run(["git", "--no-optional-locks", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.rstrip("\n") if result.returncode == 0 else None


def changed_since(files: list[str]) -> list[str] | None:
    """Which of these are not as the commit has them."""
    printed = git("status", "--porcelain", "-z", "--no-renames", "--", *files)
    return None if printed is None else [entry[3:] for entry in printed.split("\0") if entry]


def record_of(path: str, found: str, stage: str) -> dict[str, Any] | None:
    """The record of a stage, if what it made at this path has this md5."""
    file = RECORDS / f"{stage}.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"outs": {}}
    return record if record["outs"].get(PurePosixPath(path).as_posix()) == found else None
