"""GGUF through transformers, on a file with a tiny Llama and a real byte-level tokenizer."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprotune.compat.gguf import forget_quantization, parsing_once, split_digits_first
from tests.tiny import make_model

WIDTH, HIDDEN, HEADS = 32, 64, 2
BLOCK = {
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH)),
    **dict.fromkeys(("ffn_gate", "ffn_up"), (HIDDEN, WIDTH)),
    "ffn_down": (WIDTH, HIDDEN),
}


def write(path, tokenizer_json, pre):
    """A Llama of one layer, and the tokenizer under the name of this pre-tokenizer."""
    tokenizer = json.loads(tokenizer_json.read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in BLOCK.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
