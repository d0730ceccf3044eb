"""`make` in a folder whose path has a space, an apostrophe, a % and a letter beyond ASCII."""

import os
import sys
from pathlib import Path

import pytest

from tests.clones import call, own_copy
from tests.compat.test_dvc import add_packages


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory) -> Path:
    """A finished run, with an environment where pip finds every package installed."""
    folder = own_copy(finished, tmp_path_factory.mktemp("set_up") / "josé's 50% dir" / "clone")
    call(sys.executable, "-m", "venv", "--without-pip", ".venv", cwd=folder)
    add_packages(folder / ".venv")
    # pip installs no scripts of packages that it finds
    script = folder / ".venv" / "bin" / "dvc"
    script.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -m dvc "$@"\n')
    script.chmod(0o755)
    return folder


def make(folder: Path, *arguments: str) -> str:
    """What make prints, in the environment that it sets up and no other."""
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if "venv" not in part)
    variables = [f"PATH={path}", f"PYTHON={sys.executable}", "PIP_NO_INDEX=1", "OMP_NUM_THREADS=1"]
    return call("env", "--unset=DVC_SITE_CACHE_DIR", *variables, "make", *arguments, cwd=folder).stdout


@pytest.mark.slow
def test_the_two_commands_work_in_any_folder(clone):
    """Set-up keeps what the user has configured, and installs anew what changed, whatever its date."""
    config = clone / ".dvc" / "config.local"
    config.write_text("['remote \"shared\"']\n    url = /some/é\n")
    assert "== set up" in make(clone, "setup")
    assert (clone / ".venv" / "dvc").is_dir() and (clone / ".venv" / "plots.html").is_file()
    assert "html_template = ../.venv/plots.html" in config.read_text() and "/some/é" in config.read_text()
    for name in ("requirements.lock", "pyproject.toml", "dvc.yaml"):
        os.utime(clone / name, (2**32, 2**32))
    settled = config.read_text()
    printed = make(clone, "repro")
    assert "== setting up" not in printed and "Data and pipelines are up to date." in printed, printed
    assert config.read_text() == settled
    with (clone / "requirements.lock").open("a") as file:
        file.write("# more\n")
    assert "== set up" in make(clone, "setup")
    call("git", "checkout", "-q", ".", cwd=clone)
    python = str(clone / ".venv" / "bin" / "python")
    path = f"PATH={clone}/.venv/bin:{os.environ['PATH']}"
    command = ["exp", "run", "--temp", "-S", "report.title=another"]
    printed = call("env", path, python, "-m", "dvc", *command, cwd=clone).stdout
    assert "Running stage 'report'" in printed and "Ran experiment(s)" in printed, printed[-3000:]
    assert call("git", "status", "--porcelain", cwd=clone).stdout == ""
    printed = call("env", path, python, "-m", "dvc", "plots", "show", "--out", "dvc_plots", cwd=clone).stdout
    assert "https://cdn" not in (clone / "dvc_plots" / "index.html").read_text(), printed
