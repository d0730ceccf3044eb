"""Print the chain behind a result: what made it, with which params, from what, down to the raw files and where they came from.

    python -m stages.lineage metrics/dpo/gsm8k.json
    python -m stages.lineage all.mean.dpo_vs_base.p
    python -m stages.lineage report/report.md --json

A result is a file or folder that a stage makes, or a number as `dvc metrics show` names it, of a file if several have it (`metrics/dpo/gsm8k.json:score`). The
chain is what `dvc.lock` says; where the workspace is not as it says, a line names it.
"""

import argparse
import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree
from ruamel.yaml import YAML

from stages import InputError, command, provenance
from stages.provenance import git
from stages.records import read_json

LOCK = Path("dvc.lock")


@dataclass
class Made:
    """Something that a stage made."""

    path: str
    md5: str
    stage: str
    params: dict[str, Any]
    code: dict[str, str] = field(default_factory=dict)
    """md5 of each file that the stage depends on and that no stage makes."""
    inputs: dict[str, str | None] = field(default_factory=dict)
    """What other stages made, with the md5 that it had; None where a folder was read of which it is a part."""
    stale: list[str] = field(default_factory=list)
    """Folders that it read, of which other stages have made parts anew since."""
    record: dict[str, Any] | None = None
    """Commit and versions that it was made with; None if these bytes came from the run cache or from another clone."""


def chain(path: str, stages: dict[str, Any]) -> dict[str, Made]:
    """What stages made at, below or above a path, and all that it was made from, each by its path.

    Args:
        stages: of dvc.lock.
    """
    outs = [(out["path"], out["md5"], name) for name, entry in stages.items() for out in entry.get("outs", [])]
    found: dict[str, Made] = {}
    waiting = deque(out for out in outs if related(out[0], path))
    while waiting:
        own, md5, stage = waiting.popleft()
        if own in found:
            continue
        found[own] = made = Made(own, md5, stage, stages[stage].get("params", {}).get("params.yaml", {}), record=provenance.record_of(own, md5, stage))
        for dep in stages[stage].get("deps", []):
            # that params were checked says nothing of where a number comes from
            read = [out for out in outs if related(out[0], dep["path"]) and out[2] != "check_params"]
            made.inputs |= {out[0]: dep["md5"] if out[0] == dep["path"] else None for out in read}
            if folder_md5(dep["path"], read) not in (None, dep["md5"]):
                made.stale.append(dep["path"])
            if not read and dep["path"] not in [out[0] for out in outs]:
                made.code[dep["path"]] = dep["md5"]
            waiting += read
    return found


def folder_md5(path: str, outs: list[tuple[str, str, str]]) -> str | None:
    """Of a folder of outs that are files, as DVC takes it; None of anything else."""
    if not outs or any(out[0] == path or not PurePosixPath(out[0]).is_relative_to(path) or out[1].endswith(".dir") for out in outs):
        return None
    return provenance.of_folder({str(PurePosixPath(own).relative_to(path)): md5 for own, md5, _ in outs})


def related(one: str, other: str) -> bool:
    """Whether one path is the other or lies in it."""
    return PurePosixPath(one).is_relative_to(other) or PurePosixPath(other).is_relative_to(one)


def find(result: str, stages: dict[str, Any]) -> tuple[str, str | None, Any]:
    """The path, the key and the value that are meant; the latter are None for a file or folder.

    Raises:
        InputError: nothing or several things are called so.
    """
    outs = [out["path"] for entry in stages.values() for out in entry.get("outs", [])]
    path, _, key = result.partition(":")
    path = os.path.relpath(path) if path else result
    if any(related(out, path) for out in outs):
        if not key:
            return path, None, None
        if (value := value_of(Path(path), key)) is None:
            raise InputError(f"found {result!r}, expected a key of {path}, such as all.mean.dpo.score of metrics/summary.json; or the file is not there: `dvc checkout {path}`")
        return path, key, value
    found = [out for out in outs if out.endswith(".json") and out.startswith("metrics/") and value_of(Path(out), result) is not None]
    if len(found) != 1:
        expected = f"one of {', '.join(f'{out}:{result}' for out in found[:3])}{', …' * (len(found) > 3)}" if found else "a file that a stage makes, or a number of `dvc metrics show`"
        raise InputError(f"found {result!r}, expected {expected}")
    return found[0], result, value_of(Path(found[0]), result)


def value_of(file: Path, key: str) -> Any:
    """None if the file or a part of the key is not there."""
    value: Any = read_json(file) if file.exists() else None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def source(params: dict[str, Any]) -> str:
    """Where a stage without inputs had its files from."""
    found = []
    for value in walk(params):
        if value["kind"] == "hub":
            found.append(f"Hub {value['repo']} at {value['revision']}")
        elif value["kind"] == "pypi":
            found.append(f"PyPI {value['package']}=={value['version']}, {value['path']}, sha256 {value['sha256']}")
        else:
            found.append(f"{value['path']}, sha256 {value['sha256']}")
    return "; ".join(found)


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "kind" in value:
            yield value
        for part in value.values():
            yield from walk(part)


def drawn(path: str, found: dict[str, Made], seen: set[str], tree: Tree, read: str | None = None) -> None:
    """Add to the tree; what stands in it already is only named."""
    made = found[path]
    label = f"[bold]{escape(path)}[/]  md5 {made.md5}"
    if read not in (None, made.md5):
        label += f"  [red]was {read} then: `dvc repro`[/]"
    if path in seen:
        tree.add(f"{label}  (as above)")
        return
    seen.add(path)
    branch = tree.add(label)
    values = ", ".join(f"{key} {json.dumps(value)}" for key, value in made.params.items() if not list(walk({key: value})))
    branch.add(f"by {escape(made.stage)}, {len(made.code)} files of code and settings" + (f"; {escape(values)}" if values else ""))
    branch.add(escape(made_with(made.record)))
    for folder in made.stale:
        branch.add(f"[red]{escape(folder)} was another then: `dvc repro`[/]")
    if not made.inputs:
        branch.add(f"from {escape(source(made.params))}")
    for one, md5 in made.inputs.items():
        drawn(one, found, seen, branch, md5)


def made_with(record: dict[str, Any] | None) -> str:
    if record is None:
        return f"no record in {provenance.RECORDS}/ is of these bytes: they came from the run cache, or from another clone"
    commit = f"commit {record['commit']}" if record["commit"] else "no commit"
    changed = f" (with changes in {', '.join(record['changed_since'])})" if record["changed_since"] else ""
    return f"at {commit}{changed}, with {', '.join(f'{name} {version}' for name, version in record['versions'].items())}"


def state(path: str, found: dict[str, Made]) -> dict[str, str]:
    """The commit, and what of the result or of dvc.lock is not as it was committed or recorded."""
    about = {"commit": git("rev-parse", "HEAD") or "none"}
    if git("status", "--porcelain", "--", str(LOCK), "params.yaml"):
        about["changed"] = "dvc.lock or params.yaml is not as in that commit"
    if recorded := recorded_md5(path, found):
        stage, md5 = recorded
        if provenance.md5(Path(path)) != md5:
            about["edited"] = f"{path} is not what {stage} made: `dvc repro`"
    return about


def recorded_md5(path: str, found: dict[str, Made]) -> tuple[str, str] | None:
    """Of a file that is there, the stage that made it or the folder it lies in, and the md5 that it then had, if DVC's cache still has the folder's list."""
    if not Path(path).is_file():
        return None
    if path in found:
        return found[path].stage, found[path].md5
    for own, made in found.items():
        listing = Path(".dvc/cache/files/md5") / made.md5[:2] / made.md5[2:]
        if PurePosixPath(path).is_relative_to(own) and listing.is_file():
            md5 = {entry["relpath"]: entry["md5"] for entry in read_json(listing)}
            return made.stage, md5.get(str(PurePosixPath(path).relative_to(own)), "none")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result")
    parser.add_argument("--json", action="store_true", help="the whole chain, with the hash of each file of code")
    arguments = parser.parse_args()
    if not LOCK.exists():
        raise InputError(f"{LOCK}: no such file; run this where dvc.yaml is, after `dvc repro`")
    stages = YAML(typ="safe").load(LOCK)["stages"]
    path, key, value = find(arguments.result, stages)
    found = chain(path, stages)
    about = state(path, found)
    if arguments.json:
        print(json.dumps({"result": arguments.result, "value": value, **about, "chain": [asdict(made) for made in found.values()]}, indent=1))
        return
    title = arguments.result if key is None else f"{path}: {key} = {json.dumps(value)}"
    commit, *notes = about.values()
    tree, seen = Tree(f"{escape(title)}  ({'; '.join([f'commit {commit}', *notes])})"), set()
    for made in list(found.values()):
        if related(made.path, path):
            drawn(made.path, found, seen, tree)
    # a terminal breaks long lines by itself, and what is piped keeps them
    Console(width=100_000, highlight=False).print(tree)


if __name__ == "__main__":
    command(main)
