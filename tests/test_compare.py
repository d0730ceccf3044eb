"""Comparison on known samples."""

import math

import pytest

from stages import InputError, compare
from stages.contamination import MATCH
from stages.records import read_json, write_json, write_parquet


def write_scores(folder, name: str, correct: dict[str, list[float]], contaminated: tuple[int, ...] = ()) -> None:
    match = {"data": "sft", "source": "rows", "row": 0, "coverage": 1.0, "longest": 20}
    write_parquet(folder / "contamination" / f"{name}.parquet", [match | {"doc_id": doc_id} for doc_id in contaminated], MATCH)
    for model, values in correct.items():
        mean = sum(values) / len(values)
        stderr = math.sqrt(mean * (1 - mean) / (len(values) - 1))
        write_json(folder / "metrics" / model / f"{name}.json", {"score": mean, "stderr": stderr, "n": len(values)})
        write_parquet(folder / "evals" / model / f"{name}.parquet", [{"doc_id": 3 * index, "correct": value} for index, value in enumerate(values)])


def run(folder, names):
    compare.run(names, folder / "metrics", folder / "evals", folder / "contamination", folder / "summary.json", folder / "scores.json")
    summary = read_json(folder / "summary.json")
    return summary | {table: {row["benchmark"]: row for row in summary[table]} for table in ("all", "clean")}


def test_known_samples_give_known_differences(tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 0, 0, 0], "sft": [1, 1, 0, 0], "dpo": [1, 1, 1, 0]})
    write_scores(tmp_path, "b", {"base": [1, 0], "sft": [1, 0], "dpo": [1, 1]})
    summary = run(tmp_path, ["a", "b"])
    a, b, mean = summary["all"].values()
    assert a["scores"]["sft"]["score"] == 0.5
    assert a["differences"]["sft_vs_base"] == {"difference": 0.25, "stderr": 0.25}
    assert b["differences"]["sft_vs_base"] == {"difference": 0.0, "stderr": 0.0}
    assert mean["differences"]["dpo_vs_base"]["difference"] == summary["dpo_vs_base"] == pytest.approx(0.5)
    assert mean["differences"]["sft_vs_base"] == {"difference": 0.125, "stderr": 0.125}
    assert summary["share_of_gain"] == [{"stage": "sft", "share": 0.25}, {"stage": "dpo", "share": 0.75}]
    assert (a["n"], b["n"], mean["n"]) == (4, 2, 6)
    assert {key: value for key, value in summary.items() if isinstance(value, float)} == {
        "base": 0.375, "sft": 0.5, "dpo": 0.875, "sft_vs_base": 0.125, "dpo_vs_sft": 0.375, "dpo_vs_base": 0.5,
    }  # fmt: skip
    rows = read_json(tmp_path / "scores.json")
    assert len(rows) == 9 and {row["model"] for row in rows} == {"base", "sft", "dpo"}


def test_no_gain_has_no_shares(tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 1], "sft": [1, 0], "dpo": [1, 1]})
    assert run(tmp_path, ["a"])["share_of_gain"] == []


def test_models_scored_on_other_rows_are_refused(tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 1], "sft": [1, 0], "dpo": [1, 1, 0]})
    with pytest.raises(InputError, match=r"a: the models were scored on different rows \(doc_id 6 and 0 more\)"):
        run(tmp_path, ["a"])


def test_clean_rows_are_counted_apart(tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 0, 0, 0], "sft": [1, 1, 0, 0], "dpo": [1, 1, 1, 0]}, contaminated=(0, 3, 99))
    write_scores(tmp_path, "b", {"base": [1, 0], "sft": [1, 0], "dpo": [1, 1]}, contaminated=(0,))
    summary = run(tmp_path, ["a", "b"])
    assert summary["all"]["a"]["n"] == 4 and summary["all"]["a"]["scores"]["base"]["score"] == 0.25
    clean = summary["clean"]
    assert clean["a"]["n"] == clean["mean"]["n"] == 2
    assert clean["a"]["scores"] == {"base": {"score": 0.0, "stderr": 0.0}, "sft": {"score": 0.0, "stderr": 0.0}, "dpo": {"score": 0.5, "stderr": 0.5}}
    assert clean["a"]["differences"]["dpo_vs_base"] == {"difference": 0.5, "stderr": 0.5}
    assert clean["b"] == {"benchmark": "b", "n": 1, "scores": {}, "differences": {}}, "one row has no standard error"
    assert clean["mean"]["scores"]["dpo"]["score"] == 0.5
