"""A run for the report, written by hand."""

import pytest

from tests.report.written import write_run


@pytest.fixture
def metrics(tmp_path, settings):
    return write_run(settings, tmp_path)
