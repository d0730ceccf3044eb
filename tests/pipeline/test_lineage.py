"""The chain behind a result ends at pinned sources, and shows where the workspace differs from dvc.lock."""

import hashlib
import json
import shutil

import pytest
from ruamel.yaml import YAML

from reprotune.errors import InputError
from reprotune.pipeline import lineage
from tests.tiny import ROOT

STAGES = YAML(typ="safe").load(ROOT / "dvc.lock")["stages"]
CODE = YAML(typ="safe").load(ROOT / "code.yaml")


def called(capsys, *arguments: str) -> str:
    lineage.run(arguments[0], "--json" in arguments)
    return capsys.readouterr().out


def test_a_chain_ends_at_pinned_sources():
    chain = lineage.chain("metrics/dpo/gsm8k.json", STAGES)
    assert {
        "models/dpo",
        "models/sft",
        "models/base",
        "data/reference",
        "data/tokenized/dpo",
        "data/raw/sft/alpaca_demo.parquet",
        "data/raw/preferences/dpo_demo.parquet",
        "data/raw/benchmarks/gsm8k",
    } <= chain.keys()
    assert not {"data/params.ok", "code.yaml"} & chain.keys()
    assert not any(path.startswith("metrics/sft/") for path in chain)
    for made in chain.values():
        assert made.inputs.keys() <= chain.keys()
        assert all(md5 in (None, chain[path].md5) for path, md5 in made.inputs.items())
        assert not made.stale
        assert made.inputs or "sha256 " in lineage.source(made.params)
        assert made.code == CODE[made.stage.partition("@")[0]]
    assert lineage.chain("evals", STAGES).keys() >= {
        f"evals/{model}/gsm8k.parquet" for model in ("base", "sft", "dpo")
    }


def test_a_file_that_is_split_over_packages_is_named_with_all_of_them():
    parts = [
        {"kind": "pypi", "package": f"part{n}", "version": "1.0", "path": "a", "sha256": str(n)}
        for n in (1, 2)
    ]
    params = {"model.source": {"kind": "split", "path": "whole.gguf", "sha256": "3", "parts": parts}}
    assert lineage.source(params) == (
        "whole.gguf, sha256 3; PyPI part1==1.0, a, sha256 1; PyPI part2==1.0, a, sha256 2"
    )


def test_a_number_is_found_by_its_name(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    value = json.loads((ROOT / "metrics" / "summary.json").read_text())["all"]["mean"]["dpo"]["score"]
    printed = called(capsys, "all.mean.dpo.score")
    assert printed.startswith(f"metrics/summary.json: all.mean.dpo.score = {value}  (commit ")
    assert "\x1b" not in printed
    assert "evals/sft/hellaswag.parquet" in printed and printed.count("by fetch_model,") == 1
    answer = json.loads(called(capsys, "metrics/dpo/gsm8k.json:score", "--json"))
    assert answer["value"] == json.loads((ROOT / "metrics" / "dpo" / "gsm8k.json").read_text())["score"]
    assert {made["path"]: made["stage"] for made in answer["chain"]}["models/dpo"] == "dpo"


def test_unknown_and_ambiguous_results_are_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        InputError, match=r"found 'score', expected one of metrics/base/arc_challenge\.json:score, "
    ):
        lineage.find("score", STAGES)
    with pytest.raises(
        InputError, match=r"found 'metrics/dpo/gsm8k\.json:scores', expected a key of metrics/dpo/gsm8k\.json"
    ):
        lineage.find("metrics/dpo/gsm8k.json:scores", STAGES)
    for spelled in ("./metrics//dpo/gsm8k.json", str(ROOT / "metrics/dpo/gsm8k.json")):
        assert lineage.find(spelled, STAGES)[0] == "metrics/dpo/gsm8k.json"
    for unknown in ("nonsense", "metrics/nonsense.json", "stages/sft.py"):
        with pytest.raises(InputError, match="expected a file that a stage makes, or a number"):
            lineage.find(unknown, STAGES)


def test_what_is_not_as_recorded_is_said(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "metrics", tmp_path / "metrics")
    stages = json.loads(json.dumps(STAGES))
    (model,) = (dep for dep in stages["evaluate@dpo-gsm8k"]["deps"] if dep["path"] == "models/dpo")
    model["md5"] = "0" * 32
    with (tmp_path / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)
    monkeypatch.chdir(tmp_path)
    printed = called(capsys, "metrics/dpo/gsm8k.json")
    md5 = lineage.chain("models/dpo", STAGES)["models/dpo"].md5
    assert f"models/dpo  md5 {md5}  was {'0' * 32} then: `dvc repro`" in printed
    assert "is not what" not in printed
    (tmp_path / "metrics" / "dpo" / "gsm8k.json").write_text("{}")
    printed = called(capsys, "metrics/dpo/gsm8k.json")
    assert "metrics/dpo/gsm8k.json is not what evaluate@dpo-gsm8k made: `dvc repro`" in printed


def test_a_folder_of_which_a_part_was_made_anew_is_said(tmp_path, monkeypatch, capsys):
    """The summary read all of evals/dpo; one file in it has changed since."""
    assert not lineage.chain("metrics/summary.json", STAGES)["metrics/summary.json"].stale
    stages = json.loads(json.dumps(STAGES))
    (out,) = stages["evaluate@dpo-gsm8k"]["outs"][:1]
    assert out["path"] == "evals/dpo/gsm8k.parquet"
    out["md5"] = "0" * 32
    assert lineage.chain("metrics/summary.json", stages)["metrics/summary.json"].stale == ["evals/dpo"]
    with (tmp_path / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)
    monkeypatch.chdir(tmp_path)
    assert "evals/dpo was another then: `dvc repro`" in called(capsys, "metrics/summary.json")


def test_an_edited_file_of_a_folder_is_said(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "report", tmp_path / "report")
    shutil.copy(ROOT / "dvc.lock", tmp_path)
    monkeypatch.chdir(tmp_path)
    files = [
        {"md5": hashlib.md5(file.read_bytes()).hexdigest(), "relpath": file.name}
        for file in sorted((tmp_path / "report").iterdir())
    ]
    md5 = lineage.chain("report", STAGES)["report"].md5
    (listing := tmp_path / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).parent.mkdir(parents=True)
    listing.write_text(json.dumps(files))
    assert "is not what" not in called(capsys, "report/report.md")
    (tmp_path / "report" / "report.md").write_text("better numbers")
    assert "report/report.md is not what report made: `dvc repro`" in called(capsys, "report/report.md")


def test_why_there_is_no_commit_is_said(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "dvc.lock", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "(commit none; git says: fatal: not a git repository" in called(capsys, "models/dpo")
    assert "fatal: not a git repository" in json.loads(called(capsys, "models/dpo", "--json"))["git"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "(commit none; git cannot be run: No such file or directory)" in called(capsys, "models/dpo")
