"""What is written says what it is: configs, tokenizer, template, and the name of the base."""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.model import base_checks, decoding, loading, origin, saving
from reprotune.params import HubSource
from reprotune.records import read_json
from tests import steps
from tests.conftest import changed
from tests.tiny import ROOT

HUB = HubSource(kind="hub", repo="some/base", repo_type="model", revision="0" * 40, files=["*"])


@pytest.fixture
def base(model, tmp_path):
    return shutil.copytree(model, tmp_path / "base")


def edit(file, **values) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def saved(base, settings, out, method="full", dtype="bfloat16", template="chatml"):
    """What SFT would leave, with a policy that is not trained."""
    values = {"lora.method": method, "model.dtype": dtype}
    settings = changed(settings, values)
    policy = loading.new_policy(base, settings.model, settings.lora, 1)
    tokenizer = load_tokenizer(base, ROOT / "templates" / f"{template}.jinja")
    saving.save_policy(policy, tokenizer, base, dtype, out)
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("own", [{}, {"torch_dtype": "float16", "dtype": None}, {"dtype": None}])
def test_config_and_weights_agree_about_the_dtype(own, dtype, base, settings, tmp_path):
    edit(base / "config.json", **own)
    out = saved(base, settings, tmp_path / "full", dtype=dtype)
    weights = load_file(out / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}
    config = read_json(out / "config.json")
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {dtype}
    # transformers 5 takes the config's dtype unless it is told otherwise
    assert str(AutoModelForCausalLM.from_pretrained(out).dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("own", [True, False, None])
def test_the_cache_is_used_as_the_base_says(own, base, settings, tmp_path):
    edit(base / "config.json", use_cache=own)
    out = saved(base, settings, tmp_path / "full")
    assert read_json(out / "config.json").get("use_cache") == own
    expected = AutoModelForCausalLM.from_pretrained(base).config.use_cache
    assert AutoModelForCausalLM.from_pretrained(out).config.use_cache == expected


def test_the_config_is_the_base_s_own_in_all_else(base, settings, tmp_path):
    """In the form in which it was published: other programs and older versions read that one."""
    old = {
        "rope_theta": 20000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "my_key": 0.08838834764831845,
    }
    edit(base / "config.json", rope_parameters=None, **old)
    out = saved(base, settings, tmp_path / "full")
    before, after = read_json(base / "config.json"), read_json(out / "config.json")
    different = {key for key in before if after[key] != before[key]}
    assert different == {"dtype", "eos_token_id"} and after["eos_token_id"] == 2
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (base, out)
        )
    assert (first - second).abs().max() < 0.1
    edit(base / "config.json", rope_theta=None, rope_scaling=None)
    with torch.no_grad():
        otherwise = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    assert (first - otherwise).abs().max() > 0.1, "the positions count here"


def test_of_a_base_with_more_than_text_the_part_for_text_is_published(base, settings, tmp_path):
    """transformers loads that part alone, and names it so."""
    text = {
        "vocab_size": 338, "hidden_size": 64, "intermediate_size": 128, "intermediate_size_mlp": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 2, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    whole = AutoConfig.for_model("llama4", text_config=text)
    AutoModelForCausalLM.from_config(whole).save_pretrained(base)
    whole.save_pretrained(base)
    edit(base / "config.json", text_config=read_json(base / "config.json")["text_config"] | {"my_key": 1})
    base_checks.check(base, base)
    out = saved(base, settings, tmp_path / "full")
    config = read_json(out / "config.json")
    assert (config["model_type"], config["architectures"]) == ("llama4_text", ["Llama4ForCausalLM"])
    assert (config["my_key"], config["dtype"], config["use_cache"]) == (1, "bfloat16", True)
    loading.load_base(out, settings.model)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "nowhere"])
def test_every_model_of_a_run_decodes_by_the_base_s_settings(where, base, settings, tmp_path):
    """Models before generation_config.json have such settings in config.json."""
    (base / "generation_config.json").unlink()
    asked = {"repetition_penalty": 1.3, "top_p": 0.9, "do_sample": True}
    if where == "generation_config.json":
        (base / where).write_text(json.dumps({"eos_token_id": [0, 5], "max_new_tokens": 2048, **asked}))
    elif where == "config.json":
        edit(base / where, eos_token_id=[0, 5], **asked)
    tokenizer = load_tokenizer(base, ROOT / "templates" / "chatml.jinja")
    written = []
    for method in ("lora", "full"):
        out = saved(base, settings, tmp_path / method, method=method)
        written.append((out / "generation_config.json").read_bytes())
        config = GenerationConfig.from_pretrained(out)
        assert config.eos_token_id == ([2, 0] if where == "nowhere" else [2, 0, 5])
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.repetition_penalty == (None if where == "nowhere" else 1.3)
    assert written[0] == written[1]
    assert b"transformers_version" not in written[0]
    # it is the same again for a model that starts from one that was saved
    assert decoding.content(decoding.of_run(tmp_path / "full", tokenizer)) == json.loads(written[0])


@pytest.mark.parametrize("content", ["{", "[]", '{"num_beams": "many", "early_stopping": []}'])
def test_a_generation_config_that_cannot_be_read_is_named(content, base, tokenizer):
    (base / "generation_config.json").write_text(content)
    message = r"base: generation_config\.json: not a generation config"
    with pytest.raises(InputError, match=message):
        base_checks.check(base, base)
    with pytest.raises(InputError, match=message):
        decoding.of_run(base, tokenizer)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("template", ["chatml", "alpaca"])
def test_the_published_template_is_the_trained_one_without_marks(template, method, base, settings, tmp_path):
    out = saved(base, settings, tmp_path / "out", method=method, template=template)
    assert not re.search(r"{%[-+]?\s*(end)?generation", (out / "chat_template.jinja").read_text())
    published = AutoTokenizer.from_pretrained(out)
    trained = load_tokenizer(base, ROOT / "templates" / f"{template}.jinja")
    turns = [{"role": role, "content": f"\n{role} "} for role in ("system", "user", "assistant", "user")]
    for prompt in (False, True):
        given = {"add_generation_prompt": prompt, "return_dict": False}
        assert published.apply_chat_template(turns, **given) == trained.apply_chat_template(turns, **given)


def test_the_published_tokenizer_is_read_as_it_was_trained_with(base, settings, tmp_path):
    """Without the names that transformers 5 gave to classes and to a list that 4 takes for a dict."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(base)
    edit(base / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    trained = load_tokenizer(base, ROOT / "templates" / "chatml.jinja")
    assert type(trained).__name__ == "Qwen2Tokenizer"
    out = saved(base, settings, tmp_path / "out")
    config = read_json(out / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert "extra_special_tokens" not in config
    published = AutoTokenizer.from_pretrained(out)
    assert published.special_tokens_map == trained.special_tokens_map
    assert published.extra_special_tokens == trained.extra_special_tokens
    for text in ("the red cat 2024", " two  spaces", "<|im_start|>user\nred<|im_end|>\n", "é 日本", ""):
        ids = trained(text)["input_ids"]
        assert published(text)["input_ids"] == ids and published.decode(ids) == trained.decode(ids)


def test_an_adapter_names_its_base_on_the_hub_and_goes_on_here(base, settings, tmp_path):
    """Trained, continued by DPO, loaded and merged, without a look at the Hub and without a warning."""
    folder = tmp_path / "run"
    origin.write(HUB, base)
    named = {"base_model_name_or_path": "some/base", "revision": "0" * 40}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Could not find a config file")
        steps.all_of_training(settings, base, folder)
        policy = loading.load_policy(base, folder / "dpo", settings.model)
    for name in ("sft", "dpo"):
        assert read_json(folder / name / "adapter_config.json").items() >= named.items()
    assert policy.peft_config["default"].base_model_name_or_path == str(base)


def test_an_adapter_on_a_base_without_another_name_says_where_it_is_here(base, settings, tmp_path):
    out = saved(base, settings, tmp_path / "out", method="lora")
    config = read_json(out / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base), None)
