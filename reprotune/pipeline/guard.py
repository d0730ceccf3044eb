"""Hold a stage that DVC runs against what DVC records of it.

DVC hashes a stage's deps and params after its command. What was edited meanwhile would then stand in dvc.lock
beside results that it did not make, so a stage compares them at its start and at its end.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reprotune import fingerprints, outs
from reprotune.dvc_lock import md5, read_stages, tracked
from reprotune.dvc_yaml import CODE, declared, load, value_of
from reprotune.errors import InputError
from reprotune.process import LAUNCHED, command, end_with_parent

BEGUN = "REPROTUNE_BEGUN"
"""In the environment of launched processes: a hash of deps and params as the stage began."""


def stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`, guarded if DVC started it."""
    end_with_parent()
    # DVC puts dvc.yaml's path before the name where it was called in another folder
    name = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
    command(main, guarded(name) if name else None)


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Check a stage when it begins and when it ends.

    Raises:
        InputError: the code is not what code.yaml has the fingerprint of. An installed library is not the one
            that requirements.lock pins. A folder that the stage depends on holds what no stage made. A dep or
            param was changed while the stage ran.
    """
    begun = state(name)
    root = Path.cwd()
    check_versions(root, name.partition("@")[0])
    check_code(root, name.partition("@")[0], begun)
    check_launched(name, begun)
    outs.check_folders(name)
    made = stamps(name)
    yield
    now = state(name)
    changed = [what for what, value in begun.items() if now[what] != value]
    changed += [str(path) for path, stamp in stamps(name).items() if made.get(path) != stamp and is_new(path)]
    if changed:
        raise InputError(
            f"{', '.join(changed)}: changed while {name} ran, so that DVC would record it with a result that "
            "it did not make; put it back and `dvc repro` resumes from the last checkpoint, or leave it and "
            "`dvc repro` runs the stage anew"
        )


def state(name: str) -> dict[str, Any]:
    """The md5 of each dep that no stage makes, and the value of each param, of a stage."""
    reads = declared(name)
    found: dict[str, Any] = {str(path): md5(path) if path.exists() else None for path in reads.files}
    contents = {file: load(file) for file in {file for file, _ in reads.params}}
    for file, key in reads.params:
        try:
            found[f"{file}:{key}" if key else str(file)] = value_of(contents[file], key)
        except (KeyError, TypeError):
            found[f"{file}:{key}"] = None
    return found


def stamps(name: str) -> dict[Path, list[tuple[str, int, int]]]:
    """Name, size and time of each file of the deps that stages made, as hashing them would take long."""
    return {
        path: sorted(
            (str(file), file.stat().st_size, file.stat().st_mtime_ns)
            for file in ([path] if path.is_file() else tracked(path))
        )
        for path in declared(name).folders
    }


def is_new(path: Path) -> bool:
    """Whether a dep whose files have other times is not what dvc.lock says of it either."""
    made = {out["path"]: out.get("md5") for stage in read_stages().values() for out in stage.get("outs", [])}
    return not path.exists() or md5(path) != made.get(str(path))


def check_code(root: Path, name: str, begun: dict[str, Any]) -> None:
    if name != "code" and fingerprints.of_stage(root, name) != begun[f"{CODE}:{name}"]:
        raise InputError(
            f"{CODE}: the code of {name} changed since its fingerprint was taken; `dvc repro` takes it anew "
            "and runs what that makes stale"
        )


def check_versions(root: Path, name: str) -> None:
    for library, pinned in fingerprints.versions(root, name).items():
        # 2.13.0+cu130 is 2.13.0, built for some device
        if (installed := version(library).split("+")[0]) != pinned:
            raise InputError(
                f"{fingerprints.LOCK}: {library}: found {pinned!r}, installed is {installed}; `make setup` "
                f"installs what {fingerprints.LOCK} says, or put the installed version there"
            )


def check_launched(name: str, begun: dict[str, Any]) -> None:
    """Every process of a launched stage must begin with what the first one read."""
    digest = hashlib.sha256(json.dumps(begun, sort_keys=True).encode()).hexdigest()
    if LAUNCHED in os.environ and os.environ.get(BEGUN, digest) != digest:
        raise InputError(
            f"deps or params of {name} changed while its processes started; `dvc repro` starts it again"
        )
    os.environ[BEGUN] = digest
