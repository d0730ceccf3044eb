"""Conversations to tokens and labels, and templates that are refused."""

import itertools
import re

import pytest

from reprotune import params_file
from reprotune.data import tables
from reprotune.data.chat_tokens import IGNORED, ChatTokens
from reprotune.data.conversations import Conversation
from reprotune.data.formats import to_conversation
from reprotune.data.raw_rows import InvalidRow
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.records import read_parquet
from tests import golden
from tests.tiny import ROOT, alpaca_rows


def trained_on(tokenizer, ids, labels) -> list[str]:
    """The decoded text of each run of tokens with labels."""
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    runs = itertools.groupby(labels, key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(run)) for trained, run in runs if trained]


def test_tokens_and_labels_are_the_committed_ones(model):
    """After a change that is meant, `python -m tests.golden` writes the file anew; read its diff."""
    assert golden.written(model) == golden.FILE.read_text()


def test_only_answer_and_end_of_turn_are_trained_on(tokenizer):
    rows = alpaca_rows()
    examples = ChatTokens(tokenizer).conversations([to_conversation(row, "alpaca") for row in rows])
    for row, example in zip(rows, examples, strict=True):
        trained = trained_on(tokenizer, example["input_ids"], example["labels"])
        assert trained == [row["output"] + "<|im_end|>"]
        assert tokenizer.pad_token_id not in example["input_ids"]


def test_every_assistant_turn_is_trained_on_and_no_other(tokenizer):
    turns = [
        ("system", "be red"),
        ("user", "cat?"),
        ("assistant", "a cat"),
        ("user", "dog?"),
        ("assistant", "no dog"),
    ]
    conversation = [{"role": role, "content": content} for role, content in turns]
    (example,) = ChatTokens(tokenizer).conversations([Conversation(conversation)])
    trained = trained_on(tokenizer, example["input_ids"], example["labels"])
    assert trained == ["a cat<|im_end|>", "no dog<|im_end|>"]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == rendered.removesuffix("\n")


@pytest.mark.parametrize(("template", "eos"), [("chatml", "<|im_end|>"), ("alpaca", "<|endoftext|>")])
def test_pad_differs_from_end_of_turn(template, eos, model):
    tokenizer = load_tokenizer(model, ROOT / "templates" / f"{template}.jinja")
    assert tokenizer.eos_token == eos
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token != eos


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}{{ m['input'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ANSWER = "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"


@pytest.mark.parametrize(
    ("part", "instead", "expected"),
    [
        ("<|im_end|>", " [END OF IT]", r"an answer ends with ' \[END OF IT\]', expected one token"),
        (
            ANSWER,
            "{{ m['content'] }}<|im_end|>",
            "0 answers are marked in a conversation with 2; put `{% generation %}`",
        ),
        (ANSWER, "{% generation %}{{ m['content'] }", "not a template that can be rendered"),
        (
            ANSWER,
            "now: " + ANSWER,
            "an answer is asked for with 'user: what the user saysassistant: ', but follows",
        ),
        (
            ANSWER,
            "{% if loop.last %}" + ANSWER + "{% else %}{{ m['content'] }}{% endif %}",
            "1 answers are marked in a conversation with 2",
        ),
        (
            "{{ m['content'] }}{{ m['input'] }}",
            "{% if m['role'] != 'system' %}{{ m['content'] }}{{ m['input'] }}{% endif %}",
            "a conversation with 'what the system says' in it is rendered without it",
        ),
        (
            ANSWER,
            ANSWER.replace("m['content']", "m['content'] | truncate(1000)"),
            r"a conversation with 'a word, .* \(80,008 characters\) in it is rendered without it",
        ),
        (
            "{{ m['input'] }}",
            "{{ 1 // 0 }}",
            r"not a template that can be rendered \(.*ZeroDivisionError",
        ),
    ],
)
def test_a_template_that_cannot_train_is_refused(part, instead, expected, model, tmp_path):
    file = tmp_path / "bad.jinja"
    file.write_text(TEMPLATE)
    assert load_tokenizer(model, file).eos_token == "<|im_end|>"
    assert TEMPLATE.count(part) == 1
    file.write_text(TEMPLATE.replace(part, instead))
    with pytest.raises(InputError, match=rf"bad\.jinja: {expected}"):
        load_tokenizer(model, file)


def test_an_input_stands_behind_its_instruction_where_the_template_has_no_place_for_it(model, tmp_path):
    row = {"instruction": "say", "input": "red", "output": "cat"}
    file = tmp_path / "plain.jinja"
    for template, expected in (
        (TEMPLATE, "user: sayredassistant: cat<|im_end|>"),
        (TEMPLATE.replace("{{ m['input'] }}", ""), "user: say\n\nredassistant: cat<|im_end|>"),
    ):
        file.write_text(template)
        tokenizer = load_tokenizer(model, file)
        (example,) = ChatTokens(tokenizer).conversations([to_conversation(row, "alpaca")])
        assert tokenizer.decode(example["input_ids"]) == expected


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_row_that_is_not_rendered_whole_is_invalid(role, model, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE.replace("m['content']", "m['content'] | replace('secret', '') | trim"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens = ChatTokens(load_tokenizer(model, file))
    assert tokens.conversations([Conversation(turns)])
    for said, taken in (("  a word\n", True), ("the secret word", False)):
        conversation = Conversation(
            [turn | {"content": said} if turn["role"] == role else turn for turn in turns]
        )
        if taken:
            assert tokens.conversations([conversation])
        else:
            with pytest.raises(InvalidRow, match=f"cuts or changes the content of a turn of the {role}"):
                tokens.conversations([conversation])


CALLED = [
    {"type": "function", "function": {"name": name, "arguments": {"of": f"what {name} asks", "n": 3}}}
    for name in ("look", "sing")
]
USED = Conversation(
    [
        {"role": "user", "content": "say yes or no"},
        {"role": "assistant", "content": "", "tool_calls": CALLED},
        {"role": "tool", "content": 'it gives "much"'},
        {"role": "tool", "content": "and more"},
        {"role": "assistant", "content": "yes", "reasoning_content": "a\n thought"},
    ],
    [{"type": "function", "function": {"name": "look", "description": "what it does", "parameters": {}}}],
)


@pytest.mark.parametrize(
    ("part", "instead", "expected"),
    [
        ("message['tool_calls'] or []", "(message['tool_calls'] or [])[:1]", "changes a call of a turn"),
        (
            "['arguments'] | tojson)",
            "['arguments'] | tojson)[:9]",
            "changes a call of a turn of the assistant",
        ),
        ("+ message['content'] +", "+ message['content'][:9] +", "changes the content of a turn of the"),
        ("for tool in tools", "for tool in tools[1:]", "leaves 'description' of a tool out"),
        ("{- message['content'] -}", "{- message['content'] | replace('yes', '') -}", "changes the content"),
    ],
)
def test_a_row_of_which_a_template_cuts_a_part_is_invalid(part, instead, expected, model):
    text = (ROOT / "templates" / "chatml.jinja").read_text()
    assert part in text
    tokens = ChatTokens(load_tokenizer(model, ROOT / "templates" / "chatml.jinja"))
    assert tokens.conversations([USED])
    tokens.tokenizer.chat_template = text.replace(part, instead)
    with pytest.raises(InvalidRow, match=expected):
        tokens.conversations([USED])


@pytest.mark.parametrize(
    ("instead", "expected"),
    [
        ("{{ m['content'] }}<tool>", "answers end with '<tool>' and with '<|im_end|>', expected one token"),
        ("{{ strftime_now('%Y') }}{{ m['content'] }}<|im_end|>", "it writes the date of the day"),
    ],
)
def test_a_template_is_tried_with_results_of_tools(instead, expected, model, tmp_path):
    file = tmp_path / "bad.jinja"
    after_tool = "{% if loop.index0 and messages[loop.index0 - 1]['role'] == 'tool' %}"
    answer = (
        f"{{% generation %}}{after_tool}{instead}{{% else %}}{{{{ m['content'] }}}}<|im_end|>{{% endif %}}"
    )
    file.write_text(TEMPLATE.replace(ANSWER, answer + "{% endgeneration %}"))
    with pytest.raises(InputError, match=re.escape(expected)):
        load_tokenizer(model, file)


def test_the_template_is_the_committed_one(tokenizer):
    assert tokenizer.chat_template == (ROOT / "templates" / "chatml.jinja").read_text()


def test_ten_thousand_turns_are_no_trouble(tokenizer):
    turns = [{"from": ("human", "gpt")[n % 2], "value": "cat"} for n in range(10_000)]
    (example,) = ChatTokens(tokenizer).conversations([to_conversation({"conversations": turns}, "sharegpt")])
    assert sum(label != IGNORED for label in example["labels"]) == 2 * 5_000


def test_labels_of_real_rows_are_the_answers(model, tmp_path):
    """All 999 rows of the package: what is trained on is the answer and the end-of-turn token."""
    sources = params_file.load(ROOT / "params.yaml").data.sft.sources
    tables.run("alpaca_demo", sources["alpaca_demo"].source, tmp_path / "raw" / "alpaca_demo.parquet")
    rows = read_parquet(tmp_path / "raw" / "alpaca_demo.parquet").to_pylist()
    assert len(rows) == 999
    for template, end in (("chatml", "<|im_end|>"), ("alpaca", "<|endoftext|>")):
        tokenizer = load_tokenizer(model, ROOT / "templates" / f"{template}.jinja")
        examples = ChatTokens(tokenizer).conversations([to_conversation(row, "alpaca") for row in rows])
        for row, example in zip(rows, examples, strict=True):
            ids, labels = example["input_ids"], example["labels"]
            trained = [label for label in labels if label != IGNORED]
            assert tokenizer.decode(trained, clean_up_tokenization_spaces=False) == row["output"] + end
            start = len(ids) - len(trained)
            assert labels == [IGNORED] * start + ids[start:] and tokenizer.pad_token_id not in ids
