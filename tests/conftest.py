"""Shared tiny inputs, made once a session in temporary folders."""

import fcntl
import os
import shutil
from pathlib import Path

import hypothesis
import pytest

from stages import params
from tests import tiny
from tests.clones import DVC, call, make_clone

ROOT = tiny.ROOT
# `make test` runs two workers, and more threads than cores slow each other many times over
os.environ["OMP_NUM_THREADS"] = "1"
# the same examples on every run, and no failure for a machine that is busy
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that no worker is left alone with it."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with tiny/ (model, rows, benchmarks) and a params.yaml that uses them."""
    folder = tmp_path_factory.mktemp("world")
    tiny.make_world(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run on the tiny params, committed, made once for all of pytest's workers. Tests change copies of it (`own_copy`)."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "finished"
    with (root / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "finished.done").exists():
            # what a failed try left
            shutil.rmtree(folder, ignore_errors=True)
            make_clone(folder)
            call(*DVC, "repro", cwd=folder)
            call("git", "add", "-A", cwd=folder)
            call("git", "commit", "-qm", "run", cwd=folder)
            (root / "finished.done").touch()
    return folder


@pytest.fixture(scope="session")
def model(world) -> Path:
    return world / "tiny" / "model"


@pytest.fixture(scope="session")
def tokenizer(model):
    from stages.templating import load_tokenizer

    return load_tokenizer(model, ROOT / "templates" / "chatml.jinja")


@pytest.fixture
def settings(world) -> params.Params:
    """The tiny params, without quantization where a test does not ask for it."""
    return changed(params.load(world / "params.yaml"), {"model.quantization": "none"})


def changed(settings: params.Params, values: dict) -> params.Params:
    """A copy with other values at dotted keys, checked like a file."""
    content = settings.model_dump()
    for key, value in values.items():
        *path, last = key.split(".")
        section = content
        for part in path:
            section = section[part]
        assert last in section, key
        section[last] = value
    return params.Params.model_validate(content)
