"""From rows to tokens and labels."""

import pytest

from stages import InputError
from stages.chat import IGNORED, alpaca, conversations, load_tokenizer, render, sharegpt, tokenize, tokenize_pair, ultrafeedback
from tests.tiny import ROOT, alpaca_rows, preference_rows


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


def test_only_answer_and_end_of_turn_are_trained_on(tokenizer):
    for row in alpaca_rows():
        ids, labels = tokenize(tokenizer, alpaca(row))
        assert trained_on(tokenizer, ids, labels) == [row["output"] + "<|im_end|>"]
        assert tokenizer.pad_token_id not in ids


def test_every_assistant_turn_is_trained_on_and_no_other(tokenizer):
    turns = [("system", "be red"), ("user", "cat?"), ("assistant", "a cat"), ("user", "dog?"), ("assistant", "no dog")]
    conversation = [{"role": role, "content": content} for role, content in turns]
    ids, labels = tokenize(tokenizer, conversation)
    assert trained_on(tokenizer, ids, labels) == ["a cat<|im_end|>", "no dog<|im_end|>"]
    assert tokenizer.decode(ids) == render(tokenizer, conversation).removesuffix("\n")


def test_pad_differs_from_end_of_turn(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_pairs_share_their_prompt_and_end_their_turns(tokenizer):
    prompt, chosen, rejected = sharegpt(preference_rows()[0])
    row = tokenize_pair(tokenizer, prompt, chosen, rejected)
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row["chosen_ids"]) == chosen["content"] + "<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == rejected["content"] + "<|im_end|>"


def test_alpaca_input_follows_the_instruction():
    (prompt, _) = alpaca({"instruction": "add", "input": "1 2", "output": "3"})
    assert prompt == {"role": "user", "content": "add\n\n1 2"}


def test_ultrafeedback_needs_one_prompt():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert ultrafeedback({"chosen": turns, "rejected": turns}) == (turns[:1], turns[1], turns[1])
    with pytest.raises(ValueError, match="one prompt"):
        ultrafeedback({"chosen": turns, "rejected": [{"role": "user", "content": "other"}, turns[1]]})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "x", "input": ""}, "no key 'output'"),
        ({"instruction": "x", "input": "", "output": None}, "`output` is None"),
        ({"instruction": 3, "input": "", "output": "y"}, "`instruction` is 3"),
    ],
)
def test_a_bad_row_is_named(row, expected, tmp_path):
    with pytest.raises(InputError, match=f"rows.parquet, row 1: {expected}"):
        list(conversations([{"instruction": "a", "input": "", "output": "b"}, row], alpaca, tmp_path / "rows.parquet"))


def test_a_template_must_end_turns_with_one_token(model, tmp_path):
    template = tmp_path / "bad.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} [END OF IT]\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    with pytest.raises(InputError, match=r"bad\.jinja: an answer ends with '\[END OF IT\]', expected one token"):
        load_tokenizer(model, template)


def test_the_template_is_the_committed_one(tokenizer):
    assert tokenizer.chat_template == (ROOT / "templates" / "chatml.jinja").read_text()
