"""What is fetched, pulled or resumed from is data: nothing of it runs, nothing leaves its folder, and no secret enters it.

The report's policy is tested in test_report.py, the sandbox of code that a model writes in test_evaluate.py.
"""

import ast
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from dvc.repo import Repo
from transformers import AutoTokenizer

from stages import InputError, checkpoints, modeling, params, sources
from stages.fetch_model import copy_checkpoint
from stages.templating import load_tokenizer
from tests import steps, tiny
from tests.clones import DVC, ENVIRONMENT, call, own_copy

SECRETS = {"HF_TOKEN": "hf_" + "s3cret" * 6, "AWS_SECRET_ACCESS_KEY": "aws" + "s3cret" * 6}


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """What code that should not have run would leave."""
    file = tmp_path / "owned"
    pickle.loads(pickle.dumps(Bomb(file)))
    assert file.exists(), "the bomb works"
    file.unlink()
    return file


def test_no_module_unpickles_or_trusts_code_of_others():
    for file in (tiny.ROOT / "stages").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, file
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.load", "np.load", "eval", "exec", "yaml.unsafe_load"), file
                assert not {keyword.arg for keyword in node.keywords} & {"trust_remote_code", "allow_pickle", "weights_only"}, file
    assert "trust_remote_code" not in json.dumps(params.Params.model_json_schema())


def test_weights_that_are_pickles_are_refused(mark, model, settings, tmp_path):
    """Of the base and of an adapter, beside whole ones or in their place."""
    base, adapter = tmp_path / "base", tmp_path / "sft"
    shutil.copytree(model, base)
    steps.tokenize_sft(settings, base, tiny.alpaca_rows(), tmp_path)
    steps.sft(settings, base, tmp_path)
    bomb = pickle.dumps(Bomb(mark))
    for folder, names in ((base, ("pytorch_model.bin", "training_args.bin")), (adapter, ("adapter_model.bin", "training_args.bin"))):
        for name in names:
            (folder / name).write_bytes(bomb)
    modeling.load_policy(base, adapter, settings.model)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="the adapter could not be loaded"):
        modeling.load_policy(base, adapter, settings.model)
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the model could not be loaded"):
        modeling.load_base(base, settings.model)
    assert not mark.exists()


def test_a_checkpoint_is_read_as_tensors_alone(mark, model, settings, tmp_path, monkeypatch):
    """Even one whose manifest was made to fit."""
    monkeypatch.setenv("REPROTUNE_CHECKPOINT_SECONDS", "0")
    steps.tokenize_sft(settings, model, tiny.alpaca_rows(), tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(modeling, "save_policy", killed)
        steps.sft(settings, model, tmp_path)
    (run,) = (path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    newest = checkpoints.found_in(run)[-1]
    for file in [*newest.glob("*.pt"), *newest.glob("*.pth")]:
        file.write_bytes(pickle.dumps(Bomb(mark)))
    (newest / checkpoints.MANIFEST).unlink()
    checkpoints.seal(newest)
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        steps.sft(settings, model, tmp_path)
    assert not mark.exists()


def test_a_model_brings_no_code(mark, model, settings, tmp_path):
    """Neither is it fetched with it, nor run if it lies there."""
    source, base = tmp_path / "source", tmp_path / "base"
    shutil.copytree(model, source)
    (source / "modeling_own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own: pass\n")
    config = json.loads((source / "config.json").read_text())
    classes = {name: "modeling_own.Own" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (source / "config.json").write_text(json.dumps(config | {"model_type": "own", "architectures": ["Own"], "auto_map": classes}))
    own = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(own | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["modeling_own.Own", None]}}))
    base.mkdir()
    copy_checkpoint(source, base)
    assert not list(base.glob("*.py"))
    for folder in (source, base):
        with pytest.raises(InputError, match="the model could not be loaded"):
            modeling.load_base(folder, settings.model)
        try:
            load_tokenizer(folder, steps.TEMPLATES / "chatml.jinja")
        except InputError as error:
            assert "no tokenizer could be loaded" in str(error)
    assert not mark.exists()
    assert AutoTokenizer.from_pretrained(model), "the model itself is whole"


def test_of_an_archive_regular_files_alone_are_taken(tmp_path):
    """No link that leads out, no device."""
    archive = tmp_path / "rows-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../../escaped"), (tarfile.CHRTYPE, ""), (tarfile.REGTYPE, "")):
            info = tarfile.TarInfo(f"rows-1.0/{kind!r}")
            info.type, info.linkname = kind, target
            tar.addfile(info, io.BytesIO())
    assert [name for name, _ in sources.members(archive)] == [f"rows-1.0/{tarfile.REGTYPE!r}"]


def test_dvc_keeps_its_state_where_others_cannot_write(finished, tmp_path):
    """Its machine-wide folder, which holds pickles, is open to everyone by default; `make setup` sees to it, and leaves what a user has set."""
    folder = own_copy(finished, tmp_path / "clone")
    shutil.rmtree(folder / ".dvc" / "site")
    (folder / ".dvc" / "config.local").write_text("['remote \"shared\"']\n    url = /some/where\n")
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".installed").touch()
    for _ in range(2):
        call("make", "--quiet", "setup", "--assume-old=requirements.lock", cwd=folder)
        with Repo(str(folder)) as repo:
            assert Path(repo.site_cache_dir).is_relative_to(folder / ".dvc" / "site")
            assert repo.config["remote"]["shared"]["url"] == "/some/where"
            assert repo.config["plots"]["html_template"] == f"{folder}/.venv/plots.html"
    assert stat.S_IMODE((folder / ".dvc" / "site").stat().st_mode) == 0o700 and (folder / ".dvc" / "site").stat().st_uid == os.getuid()


def test_secrets_of_the_environment_are_written_nowhere(finished, tmp_path):
    """By no stage, into no out, record or file of DVC."""
    folder = own_copy(finished, tmp_path / "clone")
    targets = ["sft", "evaluate@sft-gsm8k", "compare", "report"]
    result = subprocess.run(
        [*DVC, "repro", "--force", "--no-run-cache", "--single-item", *targets], cwd=folder, env=ENVIRONMENT | SECRETS, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0 and result.stdout.count("Running stage") == len(targets), result.stdout[-3000:]
    for secret in SECRETS.values():
        assert secret not in result.stdout
        assert not [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
    assert not re.search(r"(?i)(secret|token)\w*: *\S{20,}", (folder / "params.yaml").read_text())
