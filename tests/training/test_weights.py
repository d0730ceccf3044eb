"""Weights that training starts from: those that do not fit are refused, and NF4 layers have gradients."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, GPTNeoXConfig

from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.model import loading, policies, saving
from reprotune.planning import tracing
from tests import steps
from tests.conftest import changed
from tests.tiny import ROOT, alpaca_rows


def edited(folder: Path, out: Path, name: str, edit) -> Path:
    """A copy of a model's or an adapter's folder, with `edit` applied to the tensors in the file `name`."""
    shutil.copytree(folder, out)
    save_file(edit(load_file(folder / name)), out / name, {"format": "pt"})
    return out


def without_one(tensors: dict) -> dict:
    return dict(sorted(tensors.items())[1:])


def renamed(tensors: dict) -> dict:
    return {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}


def test_a_missing_model_file_is_named(settings, model, tmp_path):
    shutil.copytree(model, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"base: the model could not be loaded .*`dvc checkout .*base` restores it"
    ):
        loading.load_base(tmp_path / "base", settings.model)
    (tmp_path / "base" / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="the model could not be loaded"):
        loading.load_base(tmp_path / "base", settings.model)


@pytest.mark.parametrize("edit", [without_one, renamed])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_that_do_not_fit_are_refused(quantization, edit, settings, model, tmp_path):
    """The libraries would draw the missing ones at random and ignore the others."""
    settings = changed(settings, {"model.quantization": quantization})
    base = edited(model, tmp_path / "base", "model.safetensors", edit)
    with pytest.raises(
        InputError,
        match=r"base: (missing|unexpected) keys: \[.*expected exactly the weights of its config\.json",
    ):
        loading.load_base(base, settings.model)
    adapted = loading.new_policy(model, settings.model, settings.lora, 1)
    saving.save_policy(
        adapted,
        load_tokenizer(model, ROOT / "templates" / "chatml.jinja"),
        model,
        "float32",
        tmp_path / "whole",
    )
    adapter = edited(tmp_path / "whole", tmp_path / "adapter", "adapter_model.safetensors", edit)
    loading.load_policy(model, tmp_path / "whole", settings.model)
    with pytest.raises(InputError, match=r"adapter: \d+ weights are missing or too many, such as base_model"):
        loading.load_policy(model, adapter, settings.model)


def test_an_unknown_target_is_named(settings, model):
    settings = changed(settings, {"lora.target_modules": ["q_proj", "qproj"]})
    with pytest.raises(
        InputError,
        match=r"lora\.target_modules: found 'qproj', "
        r"expected the end of a layer's name, such as \['down_proj'",
    ):
        loading.new_policy(model, settings.model, settings.lora, 1)


@pytest.mark.parametrize(
    ("tied", "target", "expected"),
    [
        (
            True,
            "embed_in",
            "gpt_neox.embed_in and lm_head share theirs .tie_word_embeddings., so merging would change",
        ),
        (True, "gpt_neox.embed_in", "found 'gpt_neox.embed_in', expected layers with weights of their own"),
        (True, "lm_head", "which is the LM head lm_head, expected layers below it"),
        (False, "lm_head", "which is the LM head lm_head, expected layers below it"),
        (False, "mlp", "expected linear layers or embeddings"),
        (False, "final_layer_norm", "expected linear layers or embeddings"),
    ],
)
def test_a_target_that_cannot_have_an_adapter_is_refused(tied, target, expected, settings, tmp_path):
    """Merging would move a tied LM head with the embeddings; the adapter alone does not."""
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = changed(settings, {"lora.target_modules": ["dense", target]})
    with pytest.raises(InputError, match=rf"lora\.target_modules: .*{expected}"):
        loading.new_policy(tmp_path, settings.model, settings.lora, 1)


def test_linear_layers_with_common_weights_are_refused(settings, model):
    """As in models whose layers share some; a whole layer that is used twice is adapted in both places."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    lora = changed(settings, {"lora.target_modules": "all-linear"}).lora
    layers = policy.model.layers
    layers.append(layers[0])
    loading.check_targets(policy, lora)
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    expected = r"found 'all-linear', .*layers\.0\.self_attn\.q_proj and .*layers\.1\.self_attn\.q_proj share"
    with pytest.raises(InputError, match=expected):
        loading.check_targets(policy, lora)
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    with pytest.raises(InputError, match=expected):
        loading.check_targets(policy, lora)


@pytest.mark.parametrize("target", ["decoder", "word_embeddings"])
def test_tied_layers_are_known_whatever_their_names(target, settings):
    """Preflight finds them too, before anything is fetched."""
    config = BertConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        is_decoder=True,
    )  # fmt: skip
    settings = changed(settings, {"lora.target_modules": ["query", target]})
    with pytest.raises(InputError, match=f"found '{target}', .*(LM head|share theirs)"):
        tracing.policy(config, settings.model, settings.lora)


def test_embeddings_of_their_own_can_have_an_adapter(settings, model, tmp_path):
    """Where the LM head has other weights, the merged model predicts what the adapter does."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    settings = changed(settings, {"lora.target_modules": ["embed_tokens", "q_proj"]})
    policy = loading.new_policy(tmp_path / "base", settings.model, settings.lora, 1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    tokenizer = load_tokenizer(model, ROOT / "templates" / "chatml.jinja")
    saving.save_policy(policy, tokenizer, tmp_path / "base", "float32", tmp_path / "adapter")
    ids = torch.arange(3, 60)[None]
    loaded = loading.load_policy(tmp_path / "base", tmp_path / "adapter", settings.model)
    with policies.measuring(policy), policies.measuring(loaded):
        expected, own = policy(ids).logits, loading.load_base(tmp_path / "base", settings.model)(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (own - expected).abs().max() > 0.1


def test_an_adapter_is_not_put_on_another_base(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    steps.sft(settings, model, tmp_path)
    base = edited(
        model,
        tmp_path / "base",
        "model.safetensors",
        lambda tensors: {name: tensor * 1.01 for name, tensor in tensors.items()},
    )
    with pytest.raises(
        InputError, match=r"sft: it was trained on the base [0-9a-f]{32}, found [0-9a-f]{32} in .*base"
    ):
        loading.load_policy(base, tmp_path / "sft", settings.model)
    shutil.rmtree(base)
    shutil.copytree(model, base)
    loading.load_policy(base, tmp_path / "sft", settings.model)


def test_measuring_first_changes_no_gradient(settings, model):
    """On NF4: some CPUs have a kernel for eval mode, after which bitsandbytes computes no gradients."""
    ids = torch.arange(3, 60)[None]
    gradients = []
    for dequantized in (False, True):
        quantized = changed(settings, {"model.quantization": "nf4"}).model
        policy = loading.load_base(model, quantized, dequantized)
        with policies.measuring(policy):
            measured = float(policy(ids, labels=ids).loss)
        policy.train()
        # the gradient reaches it through every quantized layer
        weight = policy.get_input_embeddings().weight.requires_grad_()
        loss = policy(ids, labels=ids).loss
        loss.backward()
        assert loss.item() == pytest.approx(measured, abs=1e-5)
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
