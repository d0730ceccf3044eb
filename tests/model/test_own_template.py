"""A base's own chat template: a family's words, its answers marked, or the reason why that cannot be."""

import json
import re

import pytest
from transformers import AutoTokenizer
from trl import chat_template_utils as families

from reprotune.data.chat_tokens import IGNORED, ChatTokens
from reprotune.data.conversations import Conversation
from reprotune.data.raw_rows import InvalidRow
from reprotune.data.templates import OWN_FILE, load_tokenizer, template_file
from reprotune.errors import InputError
from reprotune.model import own_template
from reprotune.params_file import load
from tests import tokenizers
from tests.tiny import ROOT

USER, ANSWER = {"role": "user", "content": "a red cat?"}, {"role": "assistant", "content": "the dog"}
TALK = [USER, ANSWER, {"role": "user", "content": "two"}, {"role": "assistant", "content": "three"}]
THINK = "<think>\n\n</think>\n\n"


def base(folder, template, bos="<s>"):
    """A tokenizer with this chat template and all that looks like a special token in it."""
    special = tuple(sorted(set(re.findall(r"<\|?\w+\|?>", template)) - {"<think>"}))
    tokenizers.bytelevel(folder, special, bos_token=bos, eos_token="</s>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def trained_on(tokenizer, row):
    text = "".join("§" if label == IGNORED else tokenizer.decode([label]) for label in row["labels"])
    return [part for part in text.split("§") if part]


@pytest.mark.parametrize(
    ("name", "end", "before"),
    [
        ("qwen2_5", "<|im_end|>", ""),
        ("qwen3", "<|im_end|>", THINK),
        ("qwen3_instruct_2507", "<|im_end|>", ""),
        ("llama3", "<|eot_id|>", ""),
        ("llama3_1", "<|eot_id|>", ""),
        ("llama3_2", "<|eot_id|>", ""),
        ("gemma", "<end_of_turn>", ""),
        ("gemma3", "<end_of_turn>", ""),
    ],
)
def test_a_family_is_trained_and_asked_in_its_own_words(name, end, before, tmp_path):
    template = getattr(families, f"{name}_chat_template")
    folder = base(tmp_path, template)
    original = AutoTokenizer.from_pretrained(folder)
    own_template.write(folder)
    tokenizer = load_tokenizer(folder, folder / OWN_FILE)
    (row,) = ChatTokens(tokenizer).conversations([Conversation(TALK)])
    assert tokenizer.eos_token == end
    assert trained_on(tokenizer, row) == [f"{before}the dog{end}", f"{before}three{end}"]
    # the words are those of the family: what it is asked with, and what it answers in its last turn
    dated = {"date_string": "26 Jul 2024"}
    asked = original.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True, **dated)
    ids = original.encode(asked, add_special_tokens=False)
    if name != "qwen3":
        whole = original.apply_chat_template(TALK, tokenize=False, **dated)
        assert tokenizer.decode(row["input_ids"]) == whole.rstrip()
        assert row["input_ids"][: len(ids)] == ids
    assert tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True) == (
        original.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True, **dated)
    )
    assert row["labels"][len(row["labels"]) - 1] == tokenizer.eos_token_id


def test_thoughts_stand_where_the_family_has_them(tmp_path):
    folder = base(tmp_path, families.qwen3_chat_template)
    own_template.write(folder)
    tokenizer = load_tokenizer(folder, folder / OWN_FILE)
    talk = [USER, ANSWER | {"reasoning_content": "so"}]
    (row,) = ChatTokens(tokenizer).conversations([Conversation(talk)])
    assert trained_on(tokenizer, row) == ["<think>\nso\n</think>\n\nthe dog<|im_end|>"]
    assert tokenizer.decode(row["input_ids"]) == AutoTokenizer.from_pretrained(folder).apply_chat_template(
        talk, tokenize=False
    ).rstrip("\n")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "the base model has no chat template of its own"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "is of no family whose answers TRL can mark",
        ),
        (families.gptoss_chat_template, "it writes the date of the day, so that no run could be repeated"),
    ],
)
def test_an_own_template_that_cannot_train_is_refused_with_the_reason(template, expected, tmp_path):
    folder = base(tmp_path, template or "")
    if template is None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    own_template.write(folder)
    with pytest.raises(InputError) as error:
        load_tokenizer(folder, folder / OWN_FILE)
    assert expected in str(error.value)


def test_a_template_with_its_answers_marked_is_taken_as_it_is(tmp_path):
    text = (ROOT / "templates" / "chatml.jinja").read_text()
    folder = base(tmp_path, text)
    own_template.write(folder)
    assert (folder / OWN_FILE).read_text() == text


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    text = (ROOT / "templates" / "chatml.jinja").read_text()
    folder = base(tmp_path, text)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": text}, {"name": "tool_use", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    own_template.write(folder)
    assert (folder / OWN_FILE).read_text() == text


def test_thoughts_that_a_family_drops_make_the_row_invalid(tmp_path):
    folder = base(tmp_path, families.glm4moe_chat_template)
    own_template.write(folder)
    chat = ChatTokens(load_tokenizer(folder, folder / OWN_FILE))
    with pytest.raises(
        InvalidRow, match="it has `reasoning_content`, which the chat template has no place for"
    ):
        chat.conversations([Conversation([USER, ANSWER | {"reasoning_content": "so"}, *TALK[2:]])])


def test_params_name_it(tmp_path):
    settings = load(ROOT / "params.yaml").model.model_copy(update={"chat_template": "own"})
    assert template_file(ROOT / "templates", tmp_path, settings) == tmp_path / OWN_FILE
    assert (ROOT / "templates" / "own.jinja").exists()
