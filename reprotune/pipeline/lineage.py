"""The chain behind a result: what made it, with which params and code, from what, down to pinned sources.

The chain is what dvc.lock says. Where the workspace differs from it, a line says so.
"""

import json
import os
import subprocess
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from reprotune import dvc_lock
from reprotune.dvc_lock import LOCK, read_stages
from reprotune.errors import InputError
from reprotune.pipeline.reads import ALWAYS
from reprotune.records import read_json


class Out(NamedTuple):
    """An out of a stage, as dvc.lock has it."""

    path: str
    md5: str
    stage: str


@dataclass
class Made:
    """An out, with what it was made from."""

    path: str
    md5: str
    stage: str
    params: dict[str, Any]
    code: str
    """The fingerprint of the code that made it."""
    files: dict[str, str] = field(default_factory=dict)
    """The md5 of each dep that no stage makes: templates and configs."""
    inputs: dict[str, str | None] = field(default_factory=dict)
    """The md5 that each out had when it was read; None for a part of a folder that was read."""
    stale: list[str] = field(default_factory=list)
    """Folders that were read and of which parts were made anew since."""


def chain(path: str, stages: dict[str, Any]) -> dict[str, Made]:
    """The outs at, below or above a path, and all outs that they were made from, by path.

    Args:
        stages: of dvc.lock.
    """
    outs = outs_of(stages)
    paths = {out.path for out in outs}
    links: dict[str, Made] = {}
    waiting = deque(out for out in outs if related(out.path, path))
    while waiting:
        out = waiting.popleft()
        if out.path in links:
            continue
        params = stages[out.stage].get("params", {})
        code = params.get("code.yaml", {}).get(out.stage.partition("@")[0], "")
        links[out.path] = made = Made(*out, params.get("params.yaml", {}), code)
        for dep in stages[out.stage].get("deps", []):
            # checked params and fingerprints say nothing of where a number comes from
            read = [one for one in outs if related(one.path, dep["path"]) and one.stage not in ALWAYS]
            made.inputs |= {one.path: dep["md5"] if one.path == dep["path"] else None for one in read}
            if folder_md5(dep["path"], read) not in (None, dep["md5"]):
                made.stale.append(dep["path"])
            if not read and dep["path"] not in paths:
                made.files[dep["path"]] = dep["md5"]
            waiting += read
    return links


def outs_of(stages: dict[str, Any]) -> list[Out]:
    return [
        Out(out["path"], out["md5"], name) for name, entry in stages.items() for out in entry.get("outs", [])
    ]


def folder_md5(path: str, outs: list[Out]) -> str | None:
    """The md5 that DVC gives a folder of outs that are files; None of anything else."""
    inside = [out for out in outs if out.path != path and PurePosixPath(out.path).is_relative_to(path)]
    if not outs or inside != outs or any(out.md5.endswith(".dir") for out in outs):
        return None
    return dvc_lock.of_folder({str(PurePosixPath(out.path).relative_to(path)): out.md5 for out in outs})


def related(path: str, other: str) -> bool:
    """Whether one path is the other or lies in it."""
    return PurePosixPath(path).is_relative_to(other) or PurePosixPath(other).is_relative_to(path)


def find(result: str, stages: dict[str, Any]) -> tuple[str, str | None, Any]:
    """The path, key and value of a result; key and value are None for a file or folder.

    Args:
        result: an out, a number as `dvc metrics show` names it, or both as `metrics/dpo/gsm8k.json:score`.

    Raises:
        InputError: nothing has this name, or several files have such a number.
    """
    outs = [out.path for out in outs_of(stages)]
    path, _, key = result.partition(":")
    path = os.path.relpath(path) if path else result
    if any(related(out, path) for out in outs):
        if not key:
            return path, None, None
        if (value := value_of(Path(path), key)) is None:
            raise InputError(
                f"found {result!r}, expected a key of {path}, such as all.mean.dpo.score of "
                f"metrics/summary.json; or the file is not there: `dvc checkout {path}`"
            )
        return path, key, value
    files = [file for out in outs if out.startswith("metrics/") for file in json_files(Path(out))]
    holding = [str(file) for file in files if value_of(file, result) is not None]
    if len(holding) != 1:
        expected = "a file that a stage makes, or a number of `dvc metrics show`"
        if holding:
            more = ", …" if len(holding) > 3 else ""
            expected = f"one of {', '.join(f'{file}:{result}' for file in holding[:3])}{more}"
        raise InputError(f"found {result!r}, expected {expected}")
    return holding[0], result, value_of(Path(holding[0]), result)


def json_files(out: Path) -> list[Path]:
    """An out that is a JSON file, or the JSON files of a folder."""
    return sorted(out.rglob("*.json")) if out.is_dir() else [out] if out.suffix == ".json" else []


def value_of(file: Path, key: str) -> Any:
    """The value at a dotted key; None if the file or a part of the key is not there."""
    value: Any = read_json(file) if file.exists() else None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def source(params: dict[str, Any]) -> str:
    """Where a stage without inputs got its files from."""
    places = []
    for value in sources_in(params):
        if value["kind"] == "hub":
            places.append(f"Hub {value['repo']} at {value['revision']}")
        elif value["kind"] == "pypi":
            package = f"{value['package']}=={value['version']}"
            places.append(f"PyPI {package}, {value['path']}, sha256 {value['sha256']}")
        else:
            places.append(f"{value['path']}, sha256 {value['sha256']}")
    return "; ".join(places)


def sources_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "kind" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from sources_in(part)


def without_sources(values: dict[str, Any]) -> dict[str, Any]:
    """Params without the sources in them, which stand in the chain as what was fetched."""
    return {
        key: without_sources(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not (isinstance(value, dict) and "kind" in value)
    }


def draw(path: str, links: dict[str, Made], seen: set[str], tree: Tree, read: str | None = None) -> None:
    """Add an out to the tree; one that stands there already is only named.

    Args:
        read: the md5 that it had when it was read.
    """
    made = links[path]
    label = f"[bold]{escape(path)}[/]  md5 {made.md5}"
    if read not in (None, made.md5):
        label += f"  [red]was {read} then: `dvc repro`[/]"
    if path in seen:
        tree.add(f"{label}  (as above)")
        return
    seen.add(path)
    branch = tree.add(label)
    settings = without_sources(made.params)
    values = ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items())
    branch.add(f"by {escape(made.stage)}, code {made.code}" + (f"; {escape(values)}" if values else ""))
    for folder in made.stale:
        branch.add(f"[red]{escape(folder)} was another then: `dvc repro`[/]")
    if not made.inputs:
        branch.add(f"from {escape(source(made.params))}")
    for name, md5 in made.inputs.items():
        draw(name, links, seen, branch, md5)


def git(*arguments: str) -> str:
    """What git prints.

    Raises:
        OSError: there is no git.
        subprocess.CalledProcessError: there is no repository or no commit, or git does not trust its owner.
    """
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")


def commit() -> dict[str, str]:
    """The commit, and what differs from it; where git gives none, why."""
    try:
        about = {"commit": git("rev-parse", "--verify", "HEAD")}
        if git("status", "--porcelain", "--", str(LOCK), "params.yaml"):
            about["changed"] = "dvc.lock or params.yaml is not as in that commit"
        return about
    except OSError as error:
        return {"commit": "none", "git": f"git cannot be run: {error.strerror}"}
    except subprocess.CalledProcessError as error:
        return {"commit": "none", "git": f"git says: {' '.join(error.stderr.split())}"}


def state(path: str, links: dict[str, Made]) -> dict[str, str]:
    """The commit, and what differs from it or from dvc.lock."""
    about = commit()
    if recorded := recorded_md5(path, links):
        stage, md5 = recorded
        if dvc_lock.md5(Path(path)) != md5:
            about["edited"] = f"{path} is not what {stage} made: `dvc repro`"
    return about


def recorded_md5(path: str, links: dict[str, Made]) -> tuple[str, str] | None:
    """The stage that made a file, and the md5 that it had then.

    None for what is no file here, or lies in a folder whose list DVC's cache no longer has.
    """
    if not Path(path).is_file():
        return None
    if path in links:
        return links[path].stage, links[path].md5
    for folder, made in links.items():
        listing = Path(".dvc/cache/files/md5") / made.md5[:2] / made.md5[2:]
        if PurePosixPath(path).is_relative_to(folder) and listing.is_file():
            md5 = {entry["relpath"]: entry["md5"] for entry in read_json(listing)}
            return made.stage, md5.get(str(PurePosixPath(path).relative_to(folder)), "none")
    return None


def run(result: str, as_json: bool) -> None:
    """Print the chain behind a result as a tree, or as JSON."""
    if not LOCK.exists():
        raise InputError(f"{LOCK}: no such file; run this where dvc.yaml is, after `dvc repro`")
    stages = read_stages()
    path, key, value = find(result, stages)
    links = chain(path, stages)
    about = state(path, links)
    if as_json:
        every = [asdict(made) for made in links.values()]
        print(json.dumps({"result": result, "value": value, **about, "chain": every}, indent=1))
        return
    title = result if key is None else f"{path}: {key} = {json.dumps(value)}"
    head, *notes = about.values()
    tree = Tree(escape(f"{title}  ({'; '.join([f'commit {head}', *notes])})"))
    seen: set[str] = set()
    for made in list(links.values()):
        if related(made.path, path):
            draw(made.path, links, seen, tree)
    # a terminal breaks long lines by itself, and a pipe keeps them
    Console(width=100_000, highlight=False).print(tree)
