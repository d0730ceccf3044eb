"""A completion follows the tokens that the model is asked with, whatever the base's tokenizer does."""

import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer, Qwen3Config

from reprotune.data.chat_tokens import IGNORED, ChatTokens
from reprotune.data.conversations import Conversation
from reprotune.data.formats import to_conversation, to_pair
from reprotune.data.raw_rows import InvalidRow
from reprotune.data.templates import load_tokenizer, special_pattern
from reprotune.errors import InputError
from tests import tokenizers
from tests.tiny import ROOT, alpaca_rows, preference_rows

CHATML, GEMMA = ("<|im_start|>", "<|im_end|>"), ("<start_of_turn>", "<end_of_turn>")


def template(name):
    return ROOT / "templates" / f"{name}.jinja"


def turns(*texts):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


TALK = turns("say red", "red cat", "two dogs?", " two\ndog 12", "", "the house")[:4]


def asked_with(tokenizer, conversation):
    return tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", ["chatml", "alpaca", "gemma"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("spaces", ["first", "always", "never", "legacy"])
def test_turns_have_the_tokens_of_the_whole_text(spaces, bos, name, tmp_path):
    """Each answer follows what the model is asked with, and no space is added before later turns."""
    tokenizer = load_tokenizer(
        tokenizers.sentencepiece(tmp_path, spaces, CHATML + GEMMA, bos), template(name)
    )
    chat = ChatTokens(tokenizer)
    (row,) = chat.conversations([Conversation(TALK)])
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert row["input_ids"] == whole[: len(row["input_ids"])]
    assert row["input_ids"].count(tokenizer.bos_token_id) == bos
    trained = [index for index, label in enumerate(row["labels"]) if label != IGNORED]
    for number in (1, 3):
        prompt = asked_with(tokenizer, TALK[:number])
        assert row["input_ids"][: len(prompt)] == prompt
        assert len(prompt) in trained and len(prompt) - 1 not in trained
    (pair,) = chat.pairs([(Conversation(TALK[:3]), TALK[3], {"role": "assistant", "content": "no dog"})])
    assert pair["prompt_ids"] + pair["chosen_ids"] == row["input_ids"]
    other = tokenizer.apply_chat_template(
        [*TALK[:3], {"role": "assistant", "content": "no dog"}], return_dict=False
    )
    both = pair["prompt_ids"] + pair["rejected_ids"]
    assert both == other[: len(both)]


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_begins_as_the_base_begins_it_once(bos, tmp_path):
    """In training as in chats; a template that writes the token itself gets no second one."""
    base = tokenizers.bytelevel(tmp_path / "base", CHATML, bos, bos_token="<s>", eos_token="</s>")
    writes = tmp_path / "writes.jinja"
    writes.write_text("{{- bos_token -}}" + template("chatml").read_text())
    for file, expected in ((template("chatml"), int(bos)), (writes, 1)):
        tokenizer = load_tokenizer(base, file)
        chat = ChatTokens(tokenizer)
        rows = chat.conversations([to_conversation(row, "alpaca") for row in alpaca_rows()])
        pairs = chat.pairs([to_pair(row, "sharegpt") for row in preference_rows()])
        for ids in [row["input_ids"] for row in rows] + [pair["prompt_ids"] for pair in pairs]:
            assert ids.count(tokenizer.bos_token_id) == expected
            assert not expected or ids[0] == tokenizer.bos_token_id
        assert asked_with(tokenizer, TALK[:1]).count(tokenizer.bos_token_id) == expected
        published = tokenizer.save_pretrained(tmp_path / f"published-{expected}-{file.stem}")
        again = AutoTokenizer.from_pretrained(tmp_path / f"published-{expected}-{file.stem}")
        assert published and asked_with(again, TALK[:1]) == asked_with(tokenizer, TALK[:1])


def test_where_tokens_cannot_agree_it_is_said(tmp_path, capsys):
    """A vocabulary that joins the end of a prompt and the beginning of an answer: the prompt's tokens win."""
    base = tokenizers.bytelevel(tmp_path / "base", CHATML, eos_token="</s>")
    file = tmp_path / "joined.jinja"
    text = template("chatml").read_text()
    file.write_text(
        text.replace("<|im_start|>assistant\\n' -}}", "<|im_start|>assistant\\nthe hou' -}}").replace(
            "{{- message['content'] -}}", "{{- 'se ' + message['content'] -}}"
        )
    )
    tokenizer = load_tokenizer(base, file)
    chat = ChatTokens(tokenizer)
    assert "joins the end of a prompt" in capsys.readouterr().out
    (row,) = chat.conversations([Conversation(TALK[:2])])
    prompt = asked_with(tokenizer, TALK[:1])
    assert row["input_ids"][: len(prompt)] == prompt and row["labels"][len(prompt) - 1] == IGNORED


@pytest.mark.parametrize("named", [{"unk_token": "<|endoftext|>"}, {}])
def test_a_base_with_one_special_token_trains(named, tmp_path):
    """GPT-2's end of text is its unknown token too; Pythia's kind has a token for padding beside it."""
    end = "<|endoftext|>"
    base = tokenizers.bytelevel(tmp_path, (), bos_token=end, eos_token=end, **named)
    tokenizer = load_tokenizer(base, template("alpaca"))
    assert tokenizer.eos_token == end and tokenizer.pad_token_id == tokenizer.encode("\0")[0]
    (row,) = ChatTokens(tokenizer).conversations([Conversation(TALK)])
    assert row["labels"].count(tokenizer.eos_token_id) == 2
    assert tokenizer.pad_token_id not in row["input_ids"]


@pytest.mark.parametrize(
    ("special", "fitting"),
    [
        (("<|endoftext|>",), "alpaca"),
        (("<|endoftext|>", *GEMMA), "alpaca, gemma"),
    ],
)
def test_a_template_that_does_not_fit_names_those_that_do(special, fitting, tmp_path):
    base = tokenizers.bytelevel(tmp_path, special, eos_token="<|endoftext|>")
    with pytest.raises(InputError) as error:
        load_tokenizer(base, template("chatml"))
    assert "an answer ends with '<|im_end|>', expected one token of the base model's vocabulary" in str(
        error.value
    )
    assert f"(templates that fit this base: {fitting})" in str(error.value)


def test_a_template_that_writes_the_date_is_refused(tmp_path):
    base = tokenizers.bytelevel(tmp_path / "base", CHATML, eos_token="</s>")
    file = tmp_path / "dated.jinja"
    file.write_text("{{- strftime_now('%d %B') -}}" + template("chatml").read_text())
    with pytest.raises(InputError, match="it writes the date of the day"):
        load_tokenizer(base, file)


def test_what_a_template_has_no_place_for_makes_the_row_invalid(model):
    chats = {name: ChatTokens(load_tokenizer(model, template(name))) for name in ("chatml", "alpaca")}
    answer = {"role": "assistant", "content": "red"}
    call = {"type": "function", "function": {"name": "sing", "arguments": {"n": 1}}}
    tool = {"type": "function", "function": {"name": "sing"}}
    rows = {
        "reasoning_content": Conversation([*TALK[:1], answer | {"reasoning_content": "so"}]),
        "tool_calls": Conversation([*TALK[:1], answer | {"tool_calls": [call]}]),
        "tools": Conversation(TALK[:2], [tool]),
        "tool": Conversation([*TALK[:2], {"role": "tool", "content": "x"}, answer]),
    }
    for name, conversation in rows.items():
        assert chats["chatml"].conversations([conversation])
        with pytest.raises(InvalidRow, match=f"it has `{name}`, which the chat template has no place for"):
            chats["alpaca"].conversations([conversation])
    different = [Conversation(TALK[:2], [tool]), Conversation(TALK[:2]), Conversation(TALK[:2], [tool])]
    with_tools, without, again = chats["chatml"].conversations(different)
    assert with_tools == again != without == chats["chatml"].conversations(different[1:2])[0]


def base_of(folder, special=CHATML, processor=None, **options):
    """A byte-level tokenizer that is changed after it was saved."""
    base = tokenizers.bytelevel(folder, special, bos_token="<s>", eos_token="</s>", **options)
    if processor is not None:
        file = base / "tokenizer.json"
        tokenizer = Tokenizer.from_str(file.read_text())
        tokenizer.post_processor = processor(tokenizer)
        file.write_text(tokenizer.to_str())
    return base


@pytest.mark.parametrize("around", ["<s> <s> $A", "<s> $A </s>", "$A </s>"])
def test_a_tokenizer_that_puts_more_than_its_bos_around_a_text_is_refused(around, tmp_path):
    def processor(tokenizer):
        tokens = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        return processors.TemplateProcessing(single=around, special_tokens=tokens)

    with pytest.raises(InputError, match="expected at most its bos_token"):
        load_tokenizer(base_of(tmp_path, processor=processor), template("chatml"))


@pytest.mark.parametrize(
    "condition", ["messages[0]['role'] != 'system'", "messages[0]['role'] == 'system'", "not tools", "tools"]
)
def test_a_row_that_would_begin_otherwise_is_invalid(condition, tmp_path):
    file = tmp_path / "some.jinja"
    file.write_text(f"{{% if {condition} %}}{{{{ bos_token }}}}{{% endif %}}{template('chatml').read_text()}")
    tokenizer = load_tokenizer(base_of(tmp_path / "base", bos=True), file)
    chat = ChatTokens(tokenizer)
    system = {"role": "system", "content": "red"}
    rows = [
        Conversation(turns, tools)
        for turns in (TALK, [system, *TALK])
        for tools in ([], [{"type": "function", "function": {"name": "f"}}])
    ]
    refused = 0
    for row in rows:
        try:
            (tokens,) = chat.conversations([row])
        except InvalidRow:
            refused += 1
        else:
            assert tokens["input_ids"].count(tokenizer.bos_token_id) == 1
    assert refused == 2


def test_a_prompt_that_ends_in_a_space_keeps_it_once(tmp_path):
    """With a post-processor that trims the offsets of tokens, as Llama 3's."""
    base = base_of(tmp_path / "base", processor=lambda _: processors.ByteLevel(trim_offsets=True))
    file = tmp_path / "spaced.jinja"
    file.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {% generation %}"
        "{{ m['content'] }}</s>{% endgeneration %}{% else %}User: {{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    )
    tokenizer = load_tokenizer(base, file)
    (row,) = ChatTokens(tokenizer).conversations([Conversation(TALK[:2])])
    assert tokenizer.decode(row["input_ids"]) == "User: say red\nAssistant: red cat</s>"
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "red cat</s>"


def test_tokens_of_a_turn_are_refused_in_texts_though_they_are_not_special(tmp_path):
    base = tokenizers.bytelevel(tmp_path, (), bos_token="<s>", eos_token="</s>")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in CHATML])
    tokenizer.save_pretrained(base)
    Qwen3Config(vocab_size=len(tokenizer)).save_pretrained(base)
    pattern = special_pattern(load_tokenizer(base, template("chatml")))
    assert all(pattern.search(f"a{token}b") for token in (*CHATML, "<s>", "</s>"))


def test_padding_is_no_token_that_the_template_writes(tmp_path):
    special = ("<|a|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|start_header_id|>")
    base = tokenizers.bytelevel(tmp_path / "base", special, bos_token="<s>", eos_token="<|eot_id|>")
    file = tmp_path / "llama.jinja"
    text = template("chatml").read_text().replace("<|im_end|>", "<|eot_id|>")
    file.write_text(text.replace("<|im_start|>", "<|start_header_id|>"))
    assert load_tokenizer(base, file).pad_token == "<|finetune_right_pad_id|>"


def test_a_row_has_its_own_tools_whatever_its_neighbours_have(model):
    """In Python 1 equals True, and the order of keys does not matter."""
    chat = ChatTokens(load_tokenizer(model, template("chatml")))
    tools = [{"name": "f", "default": 1}, {"name": "f", "default": True}, {"default": 1, "name": "f"}]
    rows = [Conversation(TALK, [tool]) for tool in tools]
    together = chat.conversations(rows)
    assert together == [chat.conversations([row])[0] for row in rows]
    assert len({tuple(row["input_ids"]) for row in together}) == 3
