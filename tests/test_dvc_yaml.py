"""The contract of dvc.yaml: what a stage imports and reads is what it declares."""

import ast
import configparser
import re
from pathlib import Path

import pytest
import yaml
from dvc.dependency import ParamsDependency
from dvc.repo import Repo

from reprotune import dvc_yaml, fingerprints, params
from tests.tiny import ROOT

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = {name: entry.get("do", entry) for name, entry in PIPELINE["stages"].items()}
SECTIONS = {
    cls.__name__: cls
    for cls in vars(params).values()
    if isinstance(cls, type) and issubclass(cls, params.Section)
}


def module_file(stage: str) -> Path:
    return ROOT / "stages" / f"{stage}.py"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "code"])
def test_every_stage_has_its_own_fingerprint_among_its_params(stage):
    (entry,) = (key for key in STAGES[stage]["params"] if isinstance(key, dict) and "code.yaml" in key)
    assert entry["code.yaml"] == [stage]


def test_the_fingerprints_are_those_of_the_code():
    written = yaml.safe_load((ROOT / "code.yaml").read_text())
    assert written.keys() == STAGES.keys() - {"code"} == fingerprints.of_stages(ROOT).keys()


def test_a_stage_is_found_as_dvc_declares_it(monkeypatch):
    """`dvc_yaml.declared` fills in matrix, foreach and values as DVC's resolver does."""
    monkeypatch.chdir(ROOT)
    with Repo(str(ROOT)) as repo:
        stages = repo.index.stages
    assert len(stages) >= len(STAGES)
    for stage in stages:
        declared = dvc_yaml.declared(stage.addressing)
        assert {str(path) for path in declared.outs} == {out.def_path for out in stage.outs}
        deps = {dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)}
        assert {str(path) for path in declared.files} == {
            path for path in deps if path.split("/")[0] not in dvc_yaml.MADE and path != "code.yaml"
        }
        params_read = {
            (dep.def_path, key)
            for dep in stage.deps
            if isinstance(dep, ParamsDependency)
            for key in (dep.params or [None])
        }
        assert {(str(file), key) for file, key in declared.params} == params_read


def test_every_params_field_is_read():
    read = {
        node.attr
        for file in (ROOT / "reprotune").rglob("*.py")
        if file.name != "params.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
    } | {
        # the report shows whole source sections, and pydantic tells them apart by it
        "kind",
    }
    for name, cls in SECTIONS.items():
        for field in cls.model_fields:
            assert field in read, f"{name}.{field} is read nowhere"


def test_the_pipeline_is_short_enough_to_be_read():
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 300
    assert (ROOT / "dvc.lock").stat().st_size <= 70 * 2**10


def test_stages_are_described_and_named_like_their_modules():
    for stage, body in STAGES.items():
        assert len(body["desc"]) > 10, stage
        assert f"python -m stages.{stage} " in body["cmd"], stage
        assert module_file(stage).exists(), stage


def test_commands_hold_no_values():
    for stage, body in STAGES.items():
        variables = set(re.findall(r"\$\{([^}]*)\}", body["cmd"]))
        assert variables <= {"item.model", "item.benchmark", "key"}, stage


def test_evaluate_is_three_models_by_the_benchmarks():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert STAGES["evaluate"]["matrix"]["model"] == ["base", "sft", "dpo"]
    assert content["evaluate"]["benchmarks"] == [
        "arc_challenge",
        "commonsense_qa",
        "gsm8k",
        "hellaswag",
        "winogrande",
    ]


def test_dvc_is_configured_for_sharing():
    config = configparser.ConfigParser()
    config.read_string(re.sub(r"(?m)^\s+", "", (ROOT / ".dvc/config").read_text()))
    assert config["core"]["analytics"] == config["core"]["check_update"] == "false"
    # a relative path would be another folder for each one that DVC is called in
    assert "site_cache_dir" not in config["core"]
    remotes = [section for section in config.sections() if section.startswith("'remote")]
    assert remotes and all(config[section]["verify"] == "true" for section in remotes)
    assert {"/data/", "/models/", "/evals/"} <= set((ROOT / ".gitignore").read_text().split())
    assert "__pycache__/" in (ROOT / ".dvcignore").read_text().split()
