"""Benchmarks: the rows of the real packages, in the Hub's columns."""

import pytest

from reprotune import params, params_file
from reprotune.data import benchmarks
from reprotune.data.sources import local_sha256
from reprotune.errors import InputError
from reprotune.records import read_parquet, write_parquet
from tests.conftest import changed
from tests.tiny import ROOT

DEFAULT = params_file.load(ROOT / "params.yaml")
COLUMNS = {
    "arc_challenge": ("test", 1172, {"id", "question", "choices", "answerKey"}),
    "commonsense_qa": ("validation", 1221, {"id", "question", "question_concept", "choices", "answerKey"}),
    "gsm8k": ("test", 1319, {"question", "answer"}),
    "hellaswag": ("validation", 10042, {"activity_label", "ctx_a", "ctx_b", "endings", "label"}),
    "winogrande": ("validation", 1267, {"sentence", "option1", "option2", "answer"}),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_the_package_gives_every_row(name, tmp_path):
    split, count, columns = COLUMNS[name]
    benchmarks.run(name, DEFAULT.benchmarks[name], tmp_path)
    rows = read_parquet(tmp_path / f"{split}.parquet").to_pylist()
    assert len(rows) == count and columns <= set(rows[0])
    if name == "arc_challenge":
        row = rows[0]
        assert row["question"].startswith("An astronomer observes") and "Answer" not in row["question"]
        answer = row["choices"]["label"].index(row["answerKey"])
        assert row["choices"]["text"][answer] == "Planetary days will become shorter."
    if name == "gsm8k":
        assert rows[0]["answer"].endswith("#### 18")


def test_examples_of_another_split_lie_apart(settings, tmp_path):
    """The folder itself says which rows are scored."""
    for split in ("train", "test", "other"):
        write_parquet(
            tmp_path / "source" / f"{split}-00000-of-00001.parquet",
            [{"question": f"{split}?", "answer": "#### 1"}],
        )
    source = {"kind": "local", "path": str(tmp_path / "source"), "sha256": local_sha256(tmp_path / "source")}
    benchmark = changed(
        settings, {"benchmarks.gsm8k.fewshot_split": "train", "benchmarks.gsm8k.source": source}
    ).benchmarks["gsm8k"]
    benchmarks.run("gsm8k", benchmark, tmp_path / "out")
    files = {
        str(file.relative_to(tmp_path / "out")): read_parquet(file)["question"].to_pylist()
        for file in (tmp_path / "out").rglob("*.parquet")
    }
    assert files == {"test.parquet": ["test?"], "fewshot/train.parquet": ["train?"]}


def test_a_missing_split_is_named(settings, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    benchmark = changed(settings, {"benchmarks.gsm8k.fewshot_split": "train"}).benchmarks["gsm8k"]
    with pytest.raises(InputError, match=r"benchmarks\.gsm8k: no rows for split 'train', found \['test'\]"):
        benchmarks.run("gsm8k", benchmark, tmp_path)


@pytest.mark.parametrize(("name", "format"), [("hellaswag", "olmes_arc"), ("arc_challenge", "arrow")])
def test_a_wrong_format_is_named(name, format, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b"not what it should be")
    content = DEFAULT.model_dump()["benchmarks"][name] | {
        "format": format,
        "source": {"kind": "local", "path": str(path), "sha256": local_sha256(path)},
    }
    with pytest.raises(InputError, match=r"rows: not .*correct `path` or `format`"):
        benchmarks.run(name, params.Benchmark.model_validate(content), tmp_path / "out")
