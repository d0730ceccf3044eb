"""Tokens that the base has no embedding for are named before anything computes with them."""

import shutil

import pytest
from transformers import AddedToken, AutoTokenizer

from reprotune.data import vocabulary
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from tests.tiny import ROOT

CHATML = (ROOT / "templates" / "chatml.jinja").read_text()


@pytest.fixture
def base(model, tmp_path):
    return shutil.copytree(model, tmp_path / "base")


def with_token(base, token: str, **options) -> None:
    """Add a token, for which the weights have no embedding."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(token, **options)])
    assert tokenizer.convert_tokens_to_ids(token) == vocabulary.embeddings(base)
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("role", [None, "bos_token", "pad_token", "unk_token", "eos_token"])
def test_a_tokenizer_may_know_only_what_has_an_embedding(role, special, base):
    """But for special tokens that no row may hold, as an image's, or one that padding can do without."""
    with_token(base, "<extra>", special=special)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if role is not None:
        setattr(tokenizer, role, "<extra>")
    if role in (None, "pad_token") and special:
        vocabulary.check_tokenizer(tokenizer, vocabulary.embeddings(base), base)
        return
    message = r"base: its tokenizer: found '<extra>', token number 338 \(1 such\), expected numbers below 338"
    with pytest.raises(InputError, match=message):
        vocabulary.check_tokenizer(tokenizer, vocabulary.embeddings(base), base)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("<|im_end|>", "<extra>"),
        lambda text: text.replace("<|im_start|>", "<extra>"),
        # in a branch that no conversation here takes
        lambda text: text + "{% if tools %}<extra>{% endif %}",
        # composed, and for one role
        lambda text: (
            "{% for m in messages if m['role'] == 'system' %}{{ '<' + 'extra>' }}{% endfor %}" + text
        ),
    ],
    ids=["end of turn", "start of turn", "rare branch", "composed"],
)
def test_a_template_may_write_only_what_has_an_embedding(change, base, tmp_path):
    with_token(base, "<extra>", special=True)
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text(CHATML)
    bad.write_text(change(CHATML))
    vocabulary.check_template(load_tokenizer(base, good), base, good)
    with pytest.raises(InputError, match=r"bad\.jinja: found '<extra>', token number 338 .*another template"):
        vocabulary.check_template(load_tokenizer(base, bad), base, bad)


@pytest.mark.parametrize("refusal", ["raise_exception('no system turn')", "1 + 'no system turn'"])
def test_a_template_that_refuses_system_turns_is_checked_all_the_same(refusal, base, tmp_path):
    with_token(base, "<extra>", special=True)
    refuse = f"{{% if messages[0]['role'] == 'system' %}}{{{{ {refusal} }}}}{{% endif %}}"
    file = tmp_path / "strict.jinja"
    file.write_text(refuse + CHATML)
    vocabulary.check_template(load_tokenizer(base, file), base, file)
    file.write_text(refuse + CHATML.replace("<|im_start|>", "<ext' + 'ra>"))
    with pytest.raises(InputError, match=r"strict\.jinja: found '<extra>'"):
        vocabulary.check_template(load_tokenizer(base, file), base, file)


def test_a_token_for_padding_needs_an_embedding_where_it_is_used(base):
    with_token(base, "<pad>", special=True)
    template = ROOT / "templates" / "chatml.jinja"
    tokenizer = load_tokenizer(base, template)
    vocabulary.check_template(tokenizer, base, template)
    tokenizer.pad_token = "<pad>"
    with pytest.raises(InputError, match=r"chatml\.jinja: found '<pad>', token number 338"):
        vocabulary.check_template(tokenizer, base, template)
