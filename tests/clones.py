"""Git repositories with the tiny params in which the real `dvc` runs."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import tiny

DVC = [sys.executable, "-m", "dvc"]
STATE = tempfile.TemporaryDirectory(prefix="reprotune-dvc-")
"""DVC's own databases, which `make setup` has it keep with the environment; removed when Python ends."""
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "DVC_SITE_CACHE_DIR": STATE.name,
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@t",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@t",
}


def call(*command: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert not check or result.returncode == 0, result.stdout[-5000:]
    return result


def make_clone(
    folder: Path, architecture: str = "qwen3", benchmarks: tuple[str, ...] = ("arc_challenge", "gsm8k")
) -> Path:
    """A new repository with the files of this working tree, without outs, and with the tiny params."""
    folder.mkdir(parents=True)
    files = call(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=tiny.ROOT
    ).stdout.split("\0")
    outs = ("metrics/", "plots/", "report/", "code.yaml", "dvc.lock")
    for name in filter(None, files):
        if not name.startswith(outs) and (tiny.ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((tiny.ROOT / name).read_bytes())
    tiny.make_world(folder, architecture)
    content = YAML(typ="safe", pure=True).load((folder / "params.yaml").read_text())
    content["evaluate"]["benchmarks"] = list(benchmarks)
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    call("git", "init", "-q", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "tiny", cwd=folder)
    return folder


def with_params(folder: Path, **values) -> None:
    """Set keys of params.yaml; two underscores stand for a dot."""
    content = YAML(typ="safe", pure=True).load((folder / "params.yaml").read_text())
    for key, value in values.items():
        *path, last = key.split("__")
        section = content
        for part in path:
            section = section[part]
        section[last] = value
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(content, file)


def own_copy(finished: Path, folder: Path, *options: str) -> Path:
    """A clone of a finished run with its outs and its own cache.

    Args:
        options: of `git clone`.
    """
    call("git", "clone", "-q", *options, str(finished), str(folder), cwd=finished)
    shutil.copytree(finished / ".dvc" / "cache", folder / ".dvc" / "cache")
    call(*DVC, "checkout", cwd=folder)
    shutil.copytree(finished / "tiny", folder / "tiny", dirs_exist_ok=True)
    return folder


def of_experiment(folder: Path, name: str, file: str) -> str:
    """The content of `file` in the commit of an experiment."""
    (ref,) = call(
        "git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}", cwd=folder
    ).stdout.split()
    return call("git", "show", f"{ref}:{file}", cwd=folder).stdout


def damage(file: Path, content: bytes) -> None:
    """Overwrite a file as a faulty disk would: its mode stays the same."""
    mode = file.stat().st_mode
    file.chmod(0o644)
    file.write_bytes(content)
    file.chmod(mode)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """Mount a small file system at `folder`; skip the test where that is not possible (it takes root)."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
