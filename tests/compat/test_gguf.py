"""GGUF through transformers, on a file with a tiny Llama and a real byte-level tokenizer."""

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprotune.compat.gguf import forget_quantization, parsing_once, split_digits_first
from tests.gguf_file import write
from tests.tiny import make_model


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return write(folder / "tiny.gguf", make_model(folder / "model") / "tokenizer.json", "smollm")


def load(file):
    return (
        AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )


def test_a_file_is_parsed_several_times_unless_told_otherwise(file, monkeypatch):
    parsed = []
    parse = gguf.GGUFReader.__init__

    def counted(self, *arguments):
        parsed.append(str(arguments[0]))
        parse(self, *arguments)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    reader = gguf.GGUFReader
    load(file)
    assert len(parsed) > 2
    parsed.clear()
    with parsing_once():
        _, tokenizer = load(file)
        split_digits_first(tokenizer, str(file))
    assert parsed == [str(file)]
    assert gguf.GGUFReader is reader


def test_a_model_from_gguf_is_saved_only_without_its_quantization(file, tmp_path):
    model, _ = load(file)
    with pytest.raises(ValueError, match="gguf and is not serializable"):
        model.save_pretrained(tmp_path)
    forget_quantization(model)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(saved.config, "quantization_config")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, saved.state_dict()[name]), name


def test_smollms_digits_are_not_split_unless_told(file):
    _, tokenizer = load(file)

    def pieces() -> list[str]:
        split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("In 2024")
        return [piece for piece, _ in split]

    assert pieces() == ["In", "Ġ2024"]
    split_digits_first(tokenizer, str(file))
    assert pieces() == ["In", "Ġ", "2", "0", "2", "4"]


def test_another_pre_tokenizer_is_left_alone(file, tmp_path):
    other = write(tmp_path / "other.gguf", file.parent / "model" / "tokenizer.json", "gpt-2")
    _, tokenizer = load(other)
    before = tokenizer.backend_tokenizer.to_str()
    split_digits_first(tokenizer, str(other))
    assert tokenizer.backend_tokenizer.to_str() == before
