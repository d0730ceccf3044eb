"""What dvc.lock says that each stage read and made, and hashes as DVC takes them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pathspec import PathSpec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from reprotune.errors import InputError, first_line

LOCK = Path("dvc.lock")
IGNORE = Path(".dvcignore")


def way_back(path: Path = LOCK) -> str:
    """What to do about a lock file that cannot be read."""
    return (
        f"`git checkout HEAD {path}` brings the last one back, in a merge this side's, and `dvc repro` what "
        "was finished since, from the run cache"
    )


def read_stages(path: Path = LOCK) -> dict[str, Any]:
    """The entry of each stage by its name; none where there is no file.

    Raises:
        InputError: it is not what DVC writes, as after a merge with conflicts or half a write.
    """
    if not path.exists():
        return {}
    try:
        stages = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))["stages"]
        if not isinstance(stages, dict):
            raise TypeError(f"stages is {type(stages).__name__}")
    except (YAMLError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a lock file of DVC ({first_line(error)}); {way_back(path)}") from error
    return stages


def md5(path: Path) -> str:
    """The md5 of a file's content, or of a folder's list of files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return of_folder(files_of(path))


def files_of(folder: Path) -> dict[str, str]:
    """The md5 of each file in a folder, by its path there, without those that DVC ignores."""
    return {file.relative_to(folder).as_posix(): md5(file) for file in tracked(folder)}


def tracked(folder: Path) -> Iterator[Path]:
    """The files in a folder, without those that .dvcignore leaves out."""
    lines = IGNORE.read_text(encoding="utf-8").splitlines() if IGNORE.exists() else []
    rules = PathSpec.from_lines("gitignore", lines)
    for file in folder.rglob("*"):
        if file.is_file() and not rules.match_file(file.relative_to(folder)):
            yield file


def of_folder(files: Mapping[str, str]) -> str:
    """The md5 that DVC gives a folder.

    Args:
        files: by path in the folder, the md5 of each.
    """
    entries = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    listing = json.dumps(entries, sort_keys=True).encode()
    return hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"
