"""transformers: the private name of a config's attention."""

from transformers import AutoModelForCausalLM

from reprotune.compat.transformers import attention_of, set_attention
from tests.tiny import make_policy


def test_the_attention_of_a_config_is_known_and_has_no_public_name():
    model = make_policy("qwen3", "eager")
    assert attention_of(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert attention_of(model.config) == "sdpa"
    public = {name for name in dir(model.config) if "attn_implementation" in name and name[0] != "_"}
    assert not public, "a public name could replace attention_of"


def test_a_model_takes_the_attention_of_its_config():
    config = make_policy("qwen3", "eager").config
    set_attention(config, "sdpa")
    assert attention_of(config) == "sdpa"
    assert attention_of(AutoModelForCausalLM.from_config(config).config) == "sdpa"
