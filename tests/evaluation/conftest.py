"""The tiny benchmarks, fetched."""

import pytest

from reprotune.data import benchmarks
from tests.evaluation.known import TASKS


@pytest.fixture
def data(world, settings, tmp_path, monkeypatch):
    """A folder with one of rows for each benchmark."""
    monkeypatch.chdir(world)
    for name in TASKS:
        benchmarks.run(name, settings.benchmarks[name], tmp_path / name)
    return tmp_path
