"""Shared fixtures: tiny inputs and a finished run, made once per session in temporary folders."""

import fcntl
import os
import shutil
from pathlib import Path

import hypothesis
import pytest

from reprotune import params, params_file
from tests import tiny
from tests.clones import DVC, call, make_clone

ROOT = tiny.ROOT
# `make test` runs two workers; with more threads than cores both become many times slower
os.environ["OMP_NUM_THREADS"] = "1"
# the same examples on every run, and no failure because the machine is busy
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


PROGRAMS = {
    "bwrap": ("bubblewrap", "code that a model wrote is not run"),
    "chromium": ("chromium", "pages are not opened in a browser"),
    "g++": ("g++", "training on several processes is not tried"),
    "sshd": ("openssh-server", "SSH remotes are not tried"),
}
"""Programs that some tests need: their Debian package, and what is skipped without them."""


def pytest_report_header() -> list[str]:
    """The missing programs, and which tests are skipped without them."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = {name: needed for name, needed in PROGRAMS.items() if shutil.which(name, path=path) is None}
    lines = [f"missing: {name} (Debian: {package}): {skips}" for name, (package, skips) in missing.items()]
    return lines or [f"programs that some tests need: all here ({', '.join(PROGRAMS)})"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files run first, so that no worker is the last one at work for long."""
    items.sort(key=lambda item: item.path.name not in ("test_end_to_end.py", "test_code.py"))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with tiny/ (model, rows, benchmarks) and a params.yaml that uses them."""
    folder = tmp_path_factory.mktemp("world")
    tiny.make_world(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished, committed run on the tiny params, shared by all pytest workers.

    Tests change only copies of it, made with `own_copy`.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    # as under /home/josé: no part of the pipeline may mind
    folder = root / "josé's 50% run"
    with (root / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "finished.done").exists():
            # left by a failed try
            shutil.rmtree(folder, ignore_errors=True)
            make_clone(folder)
            call(*DVC, "repro", cwd=folder)
            call("git", "add", "-A", cwd=folder)
            call("git", "commit", "-qm", "run", cwd=folder)
            (root / "finished.done").touch()
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture(scope="session")
def model(world) -> Path:
    return world / "tiny" / "model"


@pytest.fixture(scope="session")
def tokenizer(model):
    from reprotune.data.templates import load_tokenizer

    return load_tokenizer(model, ROOT / "templates" / "chatml.jinja")


@pytest.fixture
def settings(world) -> params.Params:
    """The tiny params without quantization; a test that needs it sets it."""
    return changed(params_file.load(world / "params.yaml"), {"model.quantization": "none"})


def changed(settings: params.Params, values: dict) -> params.Params:
    """A copy with new values at dotted keys, validated like a params file."""
    content = settings.model_dump()
    for key, value in values.items():
        *path, last = key.split(".")
        section = content
        for part in path:
            section = section[part]
        assert last in section, key
        section[last] = value
    return params.Params.model_validate(content)
