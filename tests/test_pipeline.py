"""The contract of dvc.yaml: what a stage imports and reads is what it declares."""

import ast
import configparser
import re
import typing
from functools import cache
from pathlib import Path

import pytest
import yaml
from dvc.dependency import ParamsDependency
from dvc.repo import Repo

from stages import params, provenance, sections
from tests.tiny import ROOT

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]
SECTIONS = {cls.__name__: cls for cls in vars(params).values() if isinstance(cls, type) and issubclass(cls, params.Section)}


def module_file(stage: str) -> Path:
    return ROOT / "stages" / f"{stage}.py"


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def imported(file: Path) -> set[Path]:
    """Local modules that a file names, and the package itself."""
    found = {ROOT / "stages" / "__init__.py"}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stages":
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            found |= {path for name in names if (path := ROOT / "stages" / f"{name}.py").exists()}
    return found


@cache
def imports(file: Path) -> frozenset[Path]:
    """Local modules that a file needs, the package itself and what those import included."""
    found: set[Path] = set()
    waiting = imported(file)
    while waiting:
        found |= waiting
        waiting = set().union(*map(imported, waiting)) - found
    return frozenset(found)


@pytest.mark.parametrize("stage", STAGES)
def test_deps_name_every_local_import(stage):
    needed = {str(path.relative_to(ROOT)) for path in imports(module_file(stage)) | {module_file(stage)}}
    declared = {dep for dep in STAGES[stage]["deps"] if dep.startswith("stages/")}
    assert declared == needed


def section_reads(files: frozenset[Path]) -> dict[str, set[str]]:
    """For each params model, the fields read from an argument annotated with it."""
    reads: dict[str, set[str]] = {}
    for file in files:
        for function in ast.walk(tree(file)):
            if not isinstance(function, ast.FunctionDef):
                continue
            for argument in function.args.args:
                names = ast.unparse(argument.annotation).split(" | ") if argument.annotation else []
                for name in {name.split(".")[-1] for name in names} & SECTIONS.keys():
                    reads.setdefault(name, set()).update(
                        node.attr
                        for node in ast.walk(function)
                        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == argument.arg and node.attr != "model_copy"
                    )
    return reads


def params_read(stage: str) -> set[str]:
    """Dotted keys that a stage's module reads from `settings` or `params.load()`; a section passed on counts by its reads."""
    file = module_file(stage)
    reads = section_reads(frozenset({file}) | imports(file) - {ROOT / "stages" / "params.py"})
    keys = set()
    for chain in sorted(chains(tree(file)), key=len, reverse=True):
        model: typing.Any = params.Params
        path: list[str] = []
        for part in chain:
            if not (isinstance(model, type) and issubclass(model, params.Section)) or part not in model.model_fields:
                break
            path.append(part)
            model = model.model_fields[part].annotation
        key = ".".join(path)
        if not path or any(known.startswith(f"{key}.") for known in keys):
            continue
        fields = {field for base in getattr(model, "__mro__", ()) for field in reads.get(base.__name__, ())}
        keys |= {f"{key}.{field}" for field in fields} or {key}
    return keys


def chains(module: ast.Module) -> set[tuple[str, ...]]:
    """Attribute chains that start at `settings` or at a call of `params.load`."""
    found = set()
    for node in ast.walk(module):
        parts: list[str] = []
        here: ast.AST = node
        while isinstance(here, ast.Attribute):
            parts.insert(0, here.attr)
            here = here.value
        starts = (isinstance(here, ast.Name) and here.id == "settings") or (isinstance(here, ast.Call) and ast.unparse(here) == "params.load()")
        if parts and starts:
            found.add(tuple(parts))
    return found


def declared_params(stage: str) -> set[str]:
    return {re.sub(r"\.\$\{[^}]*\}", "", key) for key in STAGES[stage].get("params", []) if isinstance(key, str)}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "check_params"])
def test_params_name_every_value_that_is_read(stage):
    declared = declared_params(stage)
    for key in params_read(stage):
        covered = any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in declared)
        assert covered, f"{stage} reads {key}, declared are {sorted(declared)}"


LIBRARIES = yaml.safe_load((ROOT / "libraries.yaml").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_params_name_the_versions_of_libraries_that_are_imported(stage):
    """And the report those that it prints."""
    found = set()
    for file in imports(module_file(stage)) | {module_file(stage)}:
        for node in ast.walk(tree(file)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0] for name in names if name}
    found |= set(sections.LIBRARIES) if stage == "report" else set()
    declared = {name for one in STAGES[stage].get("params", []) if isinstance(one, dict) for name in one.get("libraries.yaml", ())}
    assert declared == found & LIBRARIES.keys()


def test_libraries_are_those_that_are_installed():
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    project = (ROOT / "pyproject.toml").read_text()
    for name, version in LIBRARIES.items():
        assert lock[name.replace("_", "-") if name.replace("_", "-") in lock else name] == version
        assert re.search(rf'"{name.replace("_", "[_-]")}(\[\w+\])?=={re.escape(version)}"', project), name


def test_a_stage_is_found_as_dvc_declares_it(monkeypatch):
    """With its matrix and values filled in, as DVC's own resolver has it."""
    monkeypatch.chdir(ROOT)
    with Repo(str(ROOT)) as repo:
        stages = repo.index.stages
    assert len(stages) >= len(STAGES)
    for stage in stages:
        found = provenance.declared(stage.addressing)
        assert {str(path) for path in found.outs} == {out.def_path for out in stage.outs}
        deps = {dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)}
        assert {str(path) for path in found.code} == {path for path in deps if path.split("/")[0] not in provenance.MADE}
        params_read = {(dep.def_path, key) for dep in stage.deps if isinstance(dep, ParamsDependency) for key in (dep.params or [None])}
        assert {(str(file), key) for file, key in found.params} == params_read


def test_the_reads_are_found():
    """The walk above would pass on finding nothing."""
    assert {"seed", "lora", "model.chat_template", "model.dtype", "sft.epochs"} <= {
        key if not key.startswith("lora.") else "lora" for key in params_read("sft")
    }
    assert params_read("fetch_model") == {"model.source"}


def test_every_params_field_is_read():
    read = {
        node.attr
        for file in (ROOT / "stages").glob("*.py")
        if file.name != "params.py"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute)
    } | {
        # shown in the report as a whole section, and told apart by pydantic
        "kind",
    }
    for name, cls in SECTIONS.items():
        for field in cls.model_fields:
            assert field in read, f"{name}.{field} is read nowhere"


def test_stages_are_described_and_named_like_their_modules():
    for stage, body in STAGES.items():
        assert len(body["desc"]) > 10, stage
        assert f"python -m stages.{stage} " in body["cmd"], stage
        assert module_file(stage).exists(), stage


def test_commands_hold_no_values():
    for stage, body in STAGES.items():
        assert {match for match in re.findall(r"\$\{([^}]*)\}", body["cmd"])} <= {"item.model", "item.benchmark"}, stage


def test_evaluate_is_three_models_by_the_benchmarks():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert STAGES["evaluate"]["matrix"]["model"] == ["base", "sft", "dpo"]
    assert content["evaluate"]["benchmarks"] == ["arc_challenge", "commonsense_qa", "gsm8k", "hellaswag", "winogrande"]


def test_dvc_is_configured_for_sharing():
    config = configparser.ConfigParser()
    config.read_string(re.sub(r"(?m)^\s+", "", (ROOT / ".dvc/config").read_text()))
    assert config["core"]["analytics"] == config["core"]["check_update"] == "false"
    assert config["core"]["site_cache_dir"] == ".dvc/site"
    remotes = [section for section in config.sections() if section.startswith("'remote")]
    assert remotes and all(config[section]["verify"] == "true" for section in remotes)
    assert {"/data/", "/models/", "/evals/"} <= set((ROOT / ".gitignore").read_text().split())
    assert "__pycache__/" in (ROOT / ".dvcignore").read_text().split()


def test_no_import_goes_back_up():
    """Shared modules never import a stage, and no stage imports another."""
    stages = {module_file(stage) for stage in STAGES}
    for file in (ROOT / "stages").glob("*.py"):
        direct = {path for path in imports(file)} - {file}
        assert not direct & stages, f"{file.name} imports {sorted(path.name for path in direct & stages)}"
