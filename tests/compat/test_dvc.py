"""DVC in folders of every kind, in an environment that was set up for it, and what goes wrong in another."""

import os
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clones import ENVIRONMENT, call
from tests.tiny import ROOT

FOLDERS = ("josé's 50% dir", '日本語 100%(x)s, [a] "b" &c;d $HOME ~ *')
PIPELINE = "stages: {copy: {cmd: cp in out, deps: [in], params: [x], outs: [out]}}"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment of its own, with the packages of this one."""
    folder = tmp_path_factory.mktemp("environment") / "josé's"
    call(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=ROOT)
    add_packages(folder)
    return folder / "bin" / "python"


def add_packages(environment: Path) -> None:
    """Have an environment use the packages of this one, but not what its .pth files do."""
    (site,) = environment.glob("lib/*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))


@pytest.fixture
def dvc(python) -> Callable[..., subprocess.CompletedProcess]:
    environment = dict(ENVIRONMENT)
    for name in ("DVC_SITE_CACHE_DIR", "PYTHONPATH"):
        environment.pop(name, None)

    def called(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(python), "-m", "dvc", *arguments],
            cwd=folder,
            env=environment | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return called


def small_project(folder: Path, dvc: Callable[..., subprocess.CompletedProcess]) -> Path:
    folder.mkdir()
    call("git", "init", "-q", cwd=folder)
    # read by DVC and written again
    call("git", "config", "user.name", "José", cwd=folder)
    assert dvc(folder, "init", "-q").returncode == 0
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text("x: 1")
    (folder / "in").write_text("content")
    (folder / "docs").mkdir()
    (folder / "docs" / "page").write_text("content")
    assert dvc(folder, "repro", "-q").returncode == 0
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "first", cwd=folder)
    return folder


def test_without_it_dvc_fails(python, dvc, tmp_path):
    """If these pass with a new DVC or configobj, reprotune/compat/dvc.py has less to do."""
    assert not list(python.parent.parent.glob("lib/*/site-packages/reprotune*"))
    state = {"DVC_SITE_CACHE_DIR": str(tmp_path / "state")}
    folder = small_project(tmp_path / "josé", lambda *arguments: dvc(*arguments, **state))
    failed = dvc(folder, "config", "--local", "core.site_cache_dir", str(folder), **state)
    assert "'ascii' codec can't encode" in failed.stdout, failed.stdout
    failed = dvc(folder, "exp", "run", "--temp", "-S", "x=2", **state)
    assert "'ascii' codec can't encode" in failed.stdout, failed.stdout
    call("git", "config", "user.name", "Jose", cwd=small_project(tmp_path / "a", dvc))
    assert dvc(tmp_path / "a", "config", "core.site_cache_dir", "state").returncode == 0
    dvc(tmp_path / "a" / "docs", "status")
    assert (tmp_path / "a" / "docs" / "state").exists()


@pytest.fixture
def set_up(python) -> Path:
    """Set the environment up, and return the folder of DVC's state."""
    for _ in range(2):
        call("env", f"PYTHONPATH={ROOT}", str(python), "-m", "reprotune.compat.dvc", cwd=python.parent)
    return python.parent.parent / "dvc"


@pytest.mark.parametrize("name", FOLDERS)
def test_dvc_works_in_any_folder(name, set_up, dvc, tmp_path):
    folder = small_project(tmp_path / name, dvc)
    remote = str(tmp_path / name / "remote é")
    assert dvc(folder, "remote", "add", "--local", "shared", remote).returncode == 0
    assert dvc(folder, "config", "--local", "remote.shared.url").stdout.strip() == remote
    printed = dvc(folder, "exp", "run", "--temp", "--name", "second", "-S", "x=2").stdout
    assert "Ran experiment(s): second" in printed, printed
    status = dvc(folder / "docs", "status")
    assert "up to date" in status.stdout, status.stdout
    assert call("git", "status", "--porcelain", "--ignored", "docs", cwd=folder).stdout == ""


def test_dvc_keeps_its_state_where_others_cannot_write(set_up, dvc, tmp_path):
    """Its folder for the whole machine holds pickles, and by default everyone may write to it."""
    folder = small_project(tmp_path / "clone", dvc)
    assert list(set_up.rglob("cache.db"))
    status = set_up.stat()
    assert stat.S_IMODE(status.st_mode) == 0o700 and status.st_uid == os.getuid()
    own = {"DVC_SITE_CACHE_DIR": str(tmp_path / "own")}
    # beside a database, SQLite keeps files that come and go
    before = sorted(set_up.rglob("cache.db"))
    (folder / "in").write_text("more")
    assert "modified" in dvc(folder, "status", **own).stdout
    assert list((tmp_path / "own").rglob("cache.db")) and sorted(set_up.rglob("cache.db")) == before


@pytest.mark.parametrize("name", ["a%20b", "#1", "really?"])
def test_a_folder_that_git_would_take_for_another_is_refused(name, python, tmp_path):
    """DVC would run an experiment there and lose it."""
    (tmp_path / name).mkdir()
    command = ["env", f"PYTHONPATH={ROOT}", str(python), "-m", "reprotune.compat.dvc"]
    result = call(*command, cwd=tmp_path / name, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "in the path of this folder, expected no #, ? or %XX" in result.stdout
