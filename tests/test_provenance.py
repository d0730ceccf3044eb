"""What dvc.lock and the records say of a stage is what made its outs."""

import json
import os
import re
import subprocess
import time

import pytest
from ruamel.yaml import YAML

from stages import STARTED, InputError, provenance
from stages.records import read_json
from tests.clones import DVC, ENVIRONMENT, call, of_experiment, own_copy, with_params

LIBRARIES = ("bitsandbytes", "lm_eval", "peft", "torch", "transformers", "trl")


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory):
    return own_copy(finished, tmp_path_factory.mktemp("provenance") / "clone")


def test_every_out_has_a_record_of_its_bytes(clone, monkeypatch):
    """Tied to dvc.lock by the md5 that it has there."""
    monkeypatch.chdir(clone)
    stages = YAML(typ="safe").load(clone / "dvc.lock")["stages"]
    for name, entry in stages.items():
        record = read_json(clone / "provenance" / f"{name}.json")
        assert record["outs"] == {out["path"]: out["md5"] for out in entry["outs"]}, name
        assert record["code"] == {dep["path"]: dep["md5"] for dep in entry["deps"] if dep["path"].split("/")[0] not in provenance.MADE}
        # the run's own commit, before which nothing was changed
        assert record["commit"] == call("git", "rev-parse", "HEAD~1", cwd=clone).stdout.strip() and record["changed_since"] == []
        assert set(record["versions"]) == {"python", *LIBRARIES}
    assert provenance.record_of("models/dpo", "another", "dpo") is None
    record = read_json(clone / "provenance" / "dpo.json")
    assert record["params"]["params.yaml:dpo"]["beta"] == 0.1 and record["params"]["libraries.yaml:trl"] == record["versions"]["trl"]


@pytest.mark.parametrize("what", ["code", "params"])
def test_what_is_edited_while_a_stage_runs_is_not_recorded(what, clone, tmp_path):
    """Neither in dvc.lock nor in a record; put back, the stage goes on from its checkpoint to the same bytes."""
    folder = own_copy(clone, tmp_path / "clone")
    lock, record = (folder / "dvc.lock").read_text(), (folder / "provenance" / "sft.json").read_text()
    environment = ENVIRONMENT | {"REPROTUNE_CHECKPOINT_SECONDS": "0"}
    process = subprocess.Popen([*DVC, "repro", "--force", "--single-item", "sft"], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = ""
    while "'loss'" not in printed and (line := process.stdout.readline()):
        printed += line
    file = folder / ("stages/packing.py" if what == "code" else "params.yaml")
    before = file.read_text()
    file.write_text(before + "\n# a line more\n" if what == "code" else re.sub(r"(?m)^  r: 4$", "  r: 8", before))
    printed += process.communicate()[0]
    name = "stages/packing.py" if what == "code" else "params.yaml:lora"
    assert process.returncode != 0 and f"error: {name}: changed while sft ran" in printed and "Traceback" not in printed, printed[-3000:]
    assert (folder / "dvc.lock").read_text() == lock and (folder / "provenance" / "sft.json").read_text() == record
    file.write_text(before)
    assert "going on from checkpoint-" in call(*DVC, "repro", "--force", "--no-run-cache", "--single-item", "sft", cwd=folder).stdout
    assert (folder / "dvc.lock").read_text() == lock


def test_what_a_stage_does_not_read_may_be_edited_while_it_runs(clone, tmp_path, monkeypatch):
    monkeypatch.chdir(own_copy(clone, tmp_path / "clone"))
    monkeypatch.setattr(provenance, "STARTED", time.time())
    run = provenance.Run("report")
    with_params(tmp_path / "clone", dpo__beta=0.1, evaluate__batch_tokens=1)
    (tmp_path / "clone" / "stages" / "scoring.py").write_text("# nothing\n")
    run.check()
    with_params(tmp_path / "clone", dpo__beta=0.2)
    with pytest.raises(InputError, match=r"params\.yaml:dpo: changed while report ran"):
        run.check()


def test_another_version_than_the_params_say_is_refused(clone, tmp_path):
    folder = own_copy(clone, tmp_path / "clone")
    file = folder / "libraries.yaml"
    installed = provenance.load(file)["lm_eval"]
    file.write_text(file.read_text().replace(f"lm_eval: {installed}", "lm_eval: 0.0.1"))
    stale = re.findall(r"^(\S+):$", call(*DVC, "status", cwd=folder).stdout, re.MULTILINE)
    assert {name.split("@")[0] for name in stale} == {"evaluate", "report"} and len(stale) == 7
    result = call(*DVC, "repro", "evaluate@base-gsm8k", cwd=folder, check=False)
    assert f"error: libraries.yaml: lm_eval: found '0.0.1', installed is {installed}; `make setup` installs" in result.stdout, result.stdout


def test_an_experiment_leaves_records_of_its_own(clone, tmp_path):
    """In its own folder, with the commit that it came from."""
    folder = own_copy(clone, tmp_path / "clone")
    printed = call(*DVC, "exp", "run", "--temp", "--name", "other", "-S", "report.title=another", cwd=folder).stdout
    assert "Running stage 'report'" in printed
    assert call("git", "status", "--porcelain", cwd=folder).stdout == ""
    record = json.loads(of_experiment(folder, "other", "provenance/report.json"))
    assert record["params"]["params.yaml:report"]["title"] == "another"


def test_dvc_may_be_called_in_another_folder(clone, tmp_path):
    """Where it calls a stage by the path of dvc.yaml, too."""
    folder = own_copy(clone, tmp_path / "clone")
    assert "Running stage '../dvc.yaml:report'" in call(*DVC, "repro", "--force", "--single-item", "../dvc.yaml:report", cwd=folder / "docs").stdout
    assert read_json(folder / "provenance" / "report.json")["stage"] == "report"


def test_a_stage_that_is_no_longer_there_is_named(clone, monkeypatch):
    monkeypatch.chdir(clone)
    for name in ("nonsense", "evaluate@dpo-nonsense"):
        with pytest.raises(InputError, match=f"dvc.yaml: found no stage {name}, which DVC runs"):
            provenance.declared(name)


def test_code_that_changed_while_it_was_loaded_is_refused(clone, tmp_path, monkeypatch):
    folder = own_copy(clone, tmp_path / "clone")
    monkeypatch.chdir(folder)
    os.utime(folder / "stages" / "statistics.py", (STARTED + 1, STARTED + 1))
    for file in [*(folder / "stages").iterdir(), folder / "libraries.yaml"]:
        if file.name != "statistics.py" and file.is_file():
            os.utime(file, (0, 0))
    with pytest.raises(InputError, match=r"stages/statistics\.py: changed while compare was loading it"):
        provenance.Run("compare")
