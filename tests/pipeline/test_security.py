"""What is fetched, pulled or resumed from is data: none of it runs, and no secret is written to it.

The report's policy is tested in tests/report/test_page.py, the sandbox of generated code in
tests/evaluation/test_sandbox.py.
"""

import ast
import io
import json
import pickle
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from reprotune import fingerprints, params
from reprotune.data import sources
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.model import loading
from reprotune.model.fetching import copy_checkpoint
from reprotune.training import checkpoints
from tests import steps, tiny
from tests.clones import DVC, ENVIRONMENT, own_copy

SECRETS = {"HF_TOKEN": "hf_" + "s3cret" * 6, "AWS_SECRET_ACCESS_KEY": "aws" + "s3cret" * 6}


class Bomb:
    """Creates the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that a `Bomb` creates, and only a `Bomb`."""
    file = tmp_path / "owned"
    pickle.loads(pickle.dumps(Bomb(file)))
    assert file.exists(), "the bomb works"
    file.unlink()
    return file


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "np.load", "eval", "exec", "yaml.unsafe_load"}
TRUSTING = {"trust_remote_code", "allow_pickle", "weights_only"}


def test_no_module_unpickles_or_trusts_code_of_others():
    files = [*(tiny.ROOT / "reprotune").rglob("*.py"), *(tiny.ROOT / "stages").glob("*.py")]
    assert len(files) > 60
    for file in files:
        imported = {name.split(".")[0] for name in fingerprints.imported_names(file.read_bytes())}
        assert not imported & PICKLES, file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in CALLS, file
                assert not {keyword.arg for keyword in node.keywords} & TRUSTING, file
    assert "trust_remote_code" not in json.dumps(params.Params.model_json_schema())


def test_weights_that_are_pickles_are_refused(mark, model, settings, tmp_path):
    """Pickles of the base model and of an adapter, next to safetensors or instead of them."""
    base, adapter = tmp_path / "base", tmp_path / "sft"
    shutil.copytree(model, base)
    steps.tokenize_sft(settings, base, tiny.alpaca_rows(), tmp_path)
    steps.sft(settings, base, tmp_path)
    bomb = pickle.dumps(Bomb(mark))
    for folder, names in (
        (base, ("pytorch_model.bin", "training_args.bin")),
        (adapter, ("adapter_model.bin", "training_args.bin")),
    ):
        for name in names:
            (folder / name).write_bytes(bomb)
    loading.load_policy(base, adapter, settings.model)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="the adapter could not be loaded"):
        loading.load_policy(base, adapter, settings.model)
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the model could not be loaded"):
        loading.load_base(base, settings.model)
    assert not mark.exists()


def test_a_checkpoint_is_read_as_tensors_alone(mark, model, settings, tmp_path, monkeypatch):
    """Pickles are refused even if the manifest of the checkpoint matches them."""
    monkeypatch.setenv("REPROTUNE_CHECKPOINT_SECONDS", "0")
    steps.tokenize_sft(settings, model, tiny.alpaca_rows(), tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("reprotune.training.trainers.save_policy", killed)
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
    """Its code is not fetched, and does not run if it is there."""
    source, base = tmp_path / "source", tmp_path / "base"
    shutil.copytree(model, source)
    (source / "modeling_own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Own: pass\n"
    )
    config = json.loads((source / "config.json").read_text())
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_own.Own")
    (source / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "architectures": ["Own"], "auto_map": classes})
    )
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["modeling_own.Own", None]}}
    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | own))
    base.mkdir()
    copy_checkpoint(source, base)
    assert not list(base.glob("*.py"))
    for folder in (source, base):
        with pytest.raises(InputError, match="the model could not be loaded"):
            loading.load_base(folder, settings.model)
        try:
            load_tokenizer(folder, steps.TEMPLATES / "chatml.jinja")
        except InputError as error:
            assert "no tokenizer could be loaded" in str(error)
    assert not mark.exists()
    assert AutoTokenizer.from_pretrained(model), "the model itself is whole"


def test_of_an_archive_regular_files_alone_are_taken(tmp_path):
    """Links that lead out of the archive and devices are left out."""
    archive = tmp_path / "rows-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for kind, target in (
            (tarfile.SYMTYPE, "/etc/passwd"),
            (tarfile.LNKTYPE, "../../escaped"),
            (tarfile.CHRTYPE, ""),
            (tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(f"rows-1.0/{kind!r}")
            info.type, info.linkname = kind, target
            tar.addfile(info, io.BytesIO())
    assert [name for name, _ in sources.members(archive)] == [f"rows-1.0/{tarfile.REGTYPE!r}"]


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(finished, tmp_path):
    """No stage writes them to an out, to metrics or to a file of DVC."""
    folder = own_copy(finished, tmp_path / "clone")
    targets = ["sft", "evaluate@sft-gsm8k", "compare", "report"]
    result = subprocess.run(
        [*DVC, "repro", "--force", "--no-run-cache", "--single-item", *targets],
        cwd=folder,
        env=ENVIRONMENT | SECRETS,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert result.stdout.count("Running stage") == len(targets), result.stdout[-3000:]
    for secret in SECRETS.values():
        assert secret not in result.stdout
        assert not [
            file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()
        ]
    assert not re.search(r"(?i)(secret|token)\w*: *\S{20,}", (folder / "params.yaml").read_text())
