"""Golden tokens and labels: one row per format through both chat templates, as readable text.

python -m tests.golden      rewrite tests/golden.txt

Tokens with a label stand in [brackets]; a middle dot separates tokens.
"""

import sys
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reprotune.data.chat_tokens import IGNORED, ChatTokens
from reprotune.data.formats import PREFERENCE_FORMATS, SFT_FORMATS, to_conversation, to_pair
from reprotune.data.raw_rows import InvalidRow
from reprotune.data.templates import load_tokenizer
from tests import tiny

FILE = Path(__file__).with_suffix(".txt")

ROWS = {
    "alpaca": {"instruction": "say red cat", "input": "two dog", "output": "red cat two dog"},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "the small house"},
            {"from": "human", "value": "one?"},
            {"from": "gpt", "value": "one cat"},
            {"from": "human", "value": "two?"},
            {"from": "gpt", "value": "two\ncat"},
        ]
    },
    "messages": {
        "messages": [{"role": "user", "content": "three 12"}, {"role": "assistant", "content": "\nfour 34"}]
    },
    "prompt_completion": {"prompt": "the bird ", "completion": " sings"},
    "openorca": {"id": "x.1", "system_prompt": "a dog", "question": "runs?", "response": "jumps"},
}
CHATS = {
    "a turn that is not trained on": {
        "messages": [
            {"role": "user", "content": "two?"},
            {"role": "assistant", "content": "three", "weight": 0},
            {"role": "user", "content": "no"},
            {"role": "assistant", "content": "two", "weight": 1},
        ]
    },
    "thoughts": {
        "system": "a cat",
        "messages": [
            {"role": "user", "content": "red?"},
            {"role": "assistant", "reasoning_content": "the house is red", "content": "red"},
        ],
    },
    "tools": {
        "tools": [{"type": "function", "function": {"name": "sing", "parameters": {"type": "object"}}}],
        "messages": [
            {"role": "system", "content": "a bird"},
            {"role": "user", "content": "sing two"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "sing", "arguments": '{"n": 1}'}},
                    {"id": "2", "type": "function", "function": {"name": "sing", "arguments": '{"n": 2}'}},
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "one"},
            {"role": "tool", "tool_call_id": "2", "content": "two"},
            {"role": "assistant", "content": "the bird sings"},
        ],
    },
}
"""Rows of the format messages with what not every template has a place for."""
PAIRS = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": "one"}],
        "chosen": {"from": "gpt", "value": "red"},
        "rejected": {"from": "gpt", "value": "blue bird"},
    },
    "ultrafeedback": {
        "chosen": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "cat"}],
        "rejected": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "dog runs"}],
    },
    "scored": {
        "instruction": "three",
        "completions": [
            {"response": "big house", "overall_score": 3.0},
            {"response": "green tree", "overall_score": 8.5},
            {"response": "small house", "overall_score": 5.0},
        ],
    },
}


def written(base: Path) -> str:
    """The text of golden.txt."""
    sections = []
    for template in ("chatml", "alpaca"):
        tokenizer = load_tokenizer(base, tiny.ROOT / "templates" / f"{template}.jinja")
        chat = ChatTokens(tokenizer)
        rows = [(name, name, row) for name, row in ROWS.items()]
        rows += [(title, "messages", row) for title, row in CHATS.items()]
        for title, name, row in rows:
            try:
                (example,) = chat.conversations([to_conversation(row, name)])
            except InvalidRow as error:
                text = f"invalid: {error}"
            else:
                text = marked(tokenizer, example["input_ids"], example["labels"])
            sections.append(f"=== {template}, {title}\n{text}")
        for name, row in PAIRS.items():
            (pair,) = chat.pairs([to_pair(row, name)])
            parts = [
                f"{column.removesuffix('_ids')}: "
                f"{marked(tokenizer, ids, ids if column != 'prompt_ids' else None)}"
                for column, ids in pair.items()
            ]
            sections.append(f"=== {template}, pair of {name}\n" + "\n".join(parts))
    return "\n\n".join(sections) + "\n"


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int] | None) -> str:
    text, inside = "", False
    for token, label in zip(ids, labels or [IGNORED] * len(ids), strict=True):
        trained = label != IGNORED
        assert label in (token, IGNORED)
        text += "[" if trained and not inside else "]" if inside and not trained else "·" if text else ""
        text += tokenizer.decode([token])
        inside = trained
    return text + "]" * inside


def main() -> None:
    assert set(ROWS) == set(SFT_FORMATS) and set(PAIRS) == set(PREFERENCE_FORMATS)
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(written(tiny.make_model(Path(folder))))
    print(f"wrote {FILE}")


if __name__ == "__main__":
    sys.exit(main())
