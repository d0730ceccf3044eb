"""Cells that cannot be compared are refused by name."""

import pytest

from reprotune.comparison import scores
from reprotune.errors import InputError
from reprotune.records import read_metrics, write_metrics
from tests.comparison.cells import summarize, with_benchmarks, write_scores

CORRECT = {"base": [1, 1], "sft": [1, 0], "dpo": [1, 1]}


def test_a_record_without_its_protocol_is_named(tmp_path):
    write_scores(tmp_path, "a", CORRECT)
    file = tmp_path / "metrics" / "sft" / "a.json"
    write_metrics(
        file, {}, {key: value for key, value in read_metrics(file).items() if key != "protocol_parts"}
    )
    with pytest.raises(
        InputError,
        match=r"sft/a\.json: found no protocol_parts, which say how it was scored; "
        "`dvc repro` scores it again",
    ):
        summarize(with_benchmarks("a"), tmp_path)


def test_models_scored_on_other_rows_are_refused(tmp_path):
    write_scores(tmp_path, "a", CORRECT | {"dpo": [1, 1, 0]})
    with pytest.raises(
        InputError, match=r"a: the models were scored on different rows \(doc_id 6 and 0 more\)"
    ):
        summarize(with_benchmarks("a"), tmp_path)


def test_samples_that_are_not_those_scored_are_named(tmp_path):
    write_scores(tmp_path, "a", CORRECT)
    metrics, samples = scores.cell_files("a", "sft", tmp_path / "metrics", tmp_path / "evals")
    write_metrics(metrics, {}, read_metrics(metrics) | {"n": 3})
    with pytest.raises(
        InputError,
        match=r"sft/a\.parquet: found 2 rows of 2 documents, expected one for each of the 3 scored; "
        "`dvc repro` scores them again",
    ):
        scores.read_cell(metrics, samples)


def test_scores_of_other_protocols_are_refused_by_what_differs(tmp_path):
    dtypes = {"base": "float32", "sft": "float32", "dpo": "bfloat16"}
    protocols = {model: {"task": "a 1", "dtype": dtype} for model, dtype in dtypes.items()}
    write_scores(tmp_path, "a", CORRECT, protocols=protocols)
    with pytest.raises(
        InputError,
        match=r"base/a\.json and .*dpo/a\.json are scores of different protocols "
        r"\(dtype: float32 and dtype: bfloat16\); score both with the same params\.yaml",
    ):
        summarize(with_benchmarks("a"), tmp_path)
