"""A base that no later stage could compute with is refused by its files, with what is supported."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprotune.errors import InputError
from reprotune.model import base_checks, loading
from tests.conftest import changed


@pytest.fixture
def base(model, tmp_path):
    return shutil.copytree(model, tmp_path / "base")


def configure(base, **values) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))


def with_tensors(base, tensors: dict) -> None:
    file = base / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def refused(base, message: str) -> None:
    with pytest.raises(InputError, match=message):
        base_checks.check(base, base)


def test_a_base_as_it_should_be_passes(base):
    base_checks.check(base, base)
    configure(base, quantization_config=None)
    # a mask, as old checkpoints hold them
    with_tensors(base, {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)})
    base_checks.check(base, base)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "mxfp4"},
        {"load_in_8bit": True},
    ],
    ids=lambda config: config.get("quant_method", "no method"),
)
def test_a_quantized_base_is_refused_by_its_config(config, base):
    said = (
        "(?s)base: config.json: found a quantization_config.*quantized already; expected weights in float32"
    )
    whole = json.loads((base / "config.json").read_text())
    configure(base, quantization_config=config)
    refused(base, said)
    configure(base, quantization_config=None, text_config=whole | {"quantization_config": config})
    refused(base, said)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(4096, 1, dtype=torch.uint8)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(128, 64, dtype=torch.int8)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(128, 64).to(torch.float8_e4m3fn)),
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(8, 128, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.weight_packed", torch.zeros(8, 128, dtype=torch.int32)),
    ],
    ids=["bitsandbytes 4 bits", "8 bits", "FP8", "GPTQ and AWQ", "compressed-tensors"],
)
def test_a_quantized_base_is_refused_by_its_weights(name, tensor, base):
    """Whatever the config says, or leaves out."""
    with_tensors(base, {name: tensor})
    refused(base, rf"found {name} in \w+: these weights are quantized already; expected weights in float32")


def test_what_bitsandbytes_saves_is_refused(settings, base, tmp_path):
    quantized = loading.load_base(base, changed(settings, {"model.quantization": "nf4"}).model)
    quantized.save_pretrained(tmp_path / "nf4")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "nf4")
    refused(tmp_path / "nf4", "found a quantization_config 'bitsandbytes'")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "nf4", r"found model\.layers.*\.weight in U8: these weights are quantized already")


def test_config_weights_and_tokenizer_must_agree_about_the_vocabulary(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    configure(base, vocab_size=400)
    refused(
        base,
        r"config\.json: vocab_size: found 400, expected the 338 rows of the weights' embed_tokens\.weight",
    )
    model.resize_token_embeddings(300)
    model.save_pretrained(base)
    refused(
        base, r"base: its tokenizer: found .*\(38 such\), expected numbers below 300, the base's vocab_size"
    )
    # as many models have it: more rows than tokens
    model.resize_token_embeddings(512)
    model.save_pretrained(base)
    base_checks.check(base, base)


def test_a_model_that_is_not_known_is_refused(base):
    configure(base, model_type="brandnew")
    refused(base, "config.json: not a causal language model that the installed transformers knows")
    configure(base, model_type="t5")
    refused(base, "config.json: not a causal language model that the installed transformers knows")


def test_a_tokenizer_that_cannot_be_read_is_refused(base):
    (base / "tokenizer.json").write_text("{}")
    refused(base, "no tokenizer could be loaded")
