"""From conversations to tokens and labels."""


import pytest

from stages import InputError
from stages.formats import to_conversation
from stages.templating import IGNORED, load_tokenizer, tokenize
from tests import golden
from tests.tiny import ROOT, alpaca_rows


def trained_on(tokenizer, ids, labels) -> list[str]:
    """The stretches of text with labels, decoded."""
    stretches, current = [], []
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            current.append(token)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return [*stretches, tokenizer.decode(current)] if current else stretches


def test_tokens_and_labels_are_the_committed_ones(model):
    """`python -m tests.golden` writes the file; read its diff."""
    assert golden.written(model) == golden.FILE.read_text()


def test_only_answer_and_end_of_turn_are_trained_on(tokenizer):
    rows = alpaca_rows()
    for row, found in zip(rows, tokenize(tokenizer, [to_conversation(row, "alpaca") for row in rows]), strict=True):
        assert trained_on(tokenizer, **{"ids": found["input_ids"], "labels": found["labels"]}) == [row["output"] + "<|im_end|>"]
        assert tokenizer.pad_token_id not in found["input_ids"]


def test_every_assistant_turn_is_trained_on_and_no_other(tokenizer):
    turns = [("system", "be red"), ("user", "cat?"), ("assistant", "a cat"), ("user", "dog?"), ("assistant", "no dog")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    (found,) = tokenize(tokenizer, [conversation])
    assert trained_on(tokenizer, found["input_ids"], found["labels"]) == ["a cat<|im_end|>", "no dog<|im_end|>"]
    assert tokenizer.decode(found["input_ids"]) == tokenizer.apply_chat_template(conversation, tokenize=False).removesuffix("\n")


@pytest.mark.parametrize(("template", "eos"), [("chatml", "<|im_end|>"), ("alpaca", "<|endoftext|>")])
def test_pad_differs_from_end_of_turn(template, eos, model):
    tokenizer = load_tokenizer(model, ROOT / "templates" / f"{template}.jinja")
    assert tokenizer.eos_token == eos
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token != eos


TEMPLATE = """{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}
{% else %}{{ m['content'] }}{{ m['input'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
ANSWER = "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"


@pytest.mark.parametrize(
    ("part", "instead", "expected"),
    [
        ("<|im_end|>", " [END OF IT]", r"an answer ends with ' \[END OF IT\]', expected one token"),
        (ANSWER, "{{ m['content'] }}<|im_end|>", "0 answers are marked in a conversation with one, 0 in one with two; put `{% generation %}`"),
        (ANSWER, "{% generation %}{{ m['content'] }", "not a template that can be rendered"),
        (ANSWER, "now: " + ANSWER, "an answer is asked for with 'user: what the user saysassistant: ', but follows"),
        (ANSWER, "{% if loop.last %}" + ANSWER + "{% else %}{{ m['content'] }}{% endif %}", "1 answers are marked in a conversation with one, 1 in one with two"),
        ("{{ m['input'] }}", "", "a conversation with 'what is given' in it is rendered without it"),
        ("{{ m['content'] }}{{ m['input'] }}", "{% if m['role'] != 'system' %}{{ m['content'] }}{{ m['input'] }}{% endif %}", "a system turn is rendered without its content"),
        ("{{ m['input'] }}", "{{ 1 // 0 }}", r"not a template that can be rendered \(.*ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_train_is_refused(part, instead, expected, model, tmp_path):
    file = tmp_path / "bad.jinja"
    file.write_text(TEMPLATE)
    assert load_tokenizer(model, file).eos_token == "<|im_end|>"
    assert TEMPLATE.count(part) == 1
    file.write_text(TEMPLATE.replace(part, instead))
    with pytest.raises(InputError, match=rf"bad\.jinja: {expected}"):
        load_tokenizer(model, file)


def test_the_template_is_the_committed_one(tokenizer):
    assert tokenizer.chat_template == (ROOT / "templates" / "chatml.jinja").read_text()


def test_ten_thousand_turns_are_no_trouble(tokenizer):
    turns = [{"from": ("human", "gpt")[n % 2], "value": "cat"} for n in range(10_000)]
    (found,) = tokenize(tokenizer, [to_conversation({"conversations": turns}, "sharegpt")])
    assert sum(label != IGNORED for label in found["labels"]) == 2 * 5_000
