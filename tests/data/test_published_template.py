"""Published templates: without transformers' marks, plain Jinja renders conversations byte for byte alike."""

from datetime import datetime
from pathlib import Path

import pytest
import trl
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from reprotune.data import published_template
from reprotune.data.published_template import without_marks
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from tests.tiny import ROOT

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
CONVERSATIONS = [
    [{"role": "user", "content": "one"}],
    [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "\n b "}],
    [
        {"role": "system", "content": "be red"},
        {"role": "user", "content": "one", "input": "two"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "c", "reasoning_content": "so", "thinking": "so"},
    ],
    [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "content": "seen"},
        {"role": "assistant", "content": "done"},
    ],
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
SHIPPED = sorted(set((ROOT / "templates").glob("*.jinja")) - {ROOT / "templates" / "own.jinja"})
OF_TRL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))
LOOP = "a \n{% for m in messages %}\n  x\n  <begin>\n {{ m['content'] }} \n\n<end>  \n y{% endfor %}\n"
"""With whitespace of every kind around the marks."""


def raise_exception(message: str) -> None:
    raise ValueError(message)


def as_plain_jinja_does(template: str, conversation: list[dict], prompt: bool) -> str:
    """llama.cpp, vLLM and text-generation-webui know these settings, and no `generation`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    environment.filters["tojson"] = lambda value, **_: repr(value)
    return environment.from_string(template).render(
        messages=conversation, add_generation_prompt=prompt, **TOKENS
    )


def as_transformers_does(template: str, conversation: list[dict], prompt: bool) -> str:
    texts, _ = render_jinja_template(
        [conversation], chat_template=template, add_generation_prompt=prompt, **TOKENS
    )
    return texts[0]


def check_same(marked: str, conversations: list[list[dict]]) -> int:
    """Compare what both templates render; returns how many conversations the marked one takes."""
    published, taken = without_marks(marked), 0
    for conversation in conversations:
        for prompt in (False, True):
            try:
                expected = as_transformers_does(marked, conversation, prompt)
            except Exception:
                # it refuses system turns, or tools
                continue
            assert as_transformers_does(published, conversation, prompt) == expected
            if not any("tool_calls" in turn for turn in conversation):
                assert as_plain_jinja_does(published, conversation, prompt) == expected
            taken += 1
    return taken


@pytest.mark.parametrize("file", [*SHIPPED, *OF_TRL], ids=lambda file: file.stem)
def test_a_template_renders_the_same_without_its_marks(file):
    assert check_same(file.read_text(), CONVERSATIONS) >= 2


@pytest.mark.parametrize("left", ["", "-", "+"])
@pytest.mark.parametrize("right", ["", "-", "+"])
@pytest.mark.parametrize("space", ["", " ", "\n  "])
def test_whitespace_around_a_mark_stays_as_it_was(left, right, space):
    begin, end = (f"{{%{left}{space}{word}{space}{right}%}}" for word in ("generation", "endgeneration"))
    marked = LOOP.replace("<begin>", begin).replace("<end>", end)
    assert check_same(marked, CONVERSATIONS[:2]) == 4
    assert "generation" not in without_marks(marked)


def test_only_marks_are_replaced():
    kept = (
        "{# around {% generation %} #}"
        "{% raw %}{% generation %}{% endraw %}"
        "{%- set o = '{{' -%}{% set e = '%}{% generation %}' %}"
        "{{ '{% generation %} }}' }}{{ \"it's \\\"{% endgeneration %}\" }}"
    )
    marked = kept + "{%- generation -%} x {% endgeneration %}"
    assert without_marks(marked) == kept + "{#- -#} x {# #}"
    assert check_same(marked, CONVERSATIONS[:1]) == 2


@pytest.mark.parametrize(
    "where", ["{}", "{{% if m['tool_calls'] %}}{}{{% endif %}}", "{{% if tools %}}{}{{% endif %}}"]
)
def test_a_template_that_needs_its_marks_is_refused(where, model, tmp_path):
    """transformers hides what is set inside a mark from what stands outside."""
    file = tmp_path / "own.jinja"
    marked = (
        "{% set end = '|' %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}SET{{ m['content'] }}<|im_end|>{% endgeneration %}{{ end }}"
        "{% else %}{{ m['content'] }}{{ m['input'] }}{% endif %}{% endfor %}"
    )
    file.write_text(marked.replace("SET", where.format("{% set other = '' %}")))
    published_template.check(load_tokenizer(model, file), file)
    file.write_text(marked.replace("SET", where.format("{% set end = '' %}")))
    message = r"own\.jinja: without `{% generation %}`, .* set no variable inside it that is read outside"
    with pytest.raises(InputError, match=message):
        load_tokenizer(model, file)
