"""The examples of a tokenized folder, those that its rows should become, and rows in the form of OpenAI."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from reprotune.data.chat_tokens import ChatTokens
from reprotune.data.formats import to_conversation
from reprotune.data.shards import read_shards

Example = tuple[list[int], list[int]]
"""input_ids and labels."""


def examples(folder: Path, part: str) -> list[Example]:
    """Each example of a part, unpacked."""
    unpacked = []
    for row in read_shards(folder, part):
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        start = 0
        for length in row["seq_lengths"]:
            end = start + length
            unpacked.append((row["input_ids"][start:end], row["labels"][start:end]))
            start = end
    return unpacked


def all_examples(folder: Path) -> list[Example]:
    return examples(folder, "train") + examples(folder, "held_out")


def expected_examples(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict], format_name: str = "alpaca"
) -> list[Example]:
    conversations = [to_conversation(row, format_name) for row in rows]
    return [(row["input_ids"], row["labels"]) for row in ChatTokens(tokenizer).conversations(conversations)]


def message(role, content):
    return {"role": role, "content": content}


def chat(*turns, **row):
    return {"messages": list(turns), **row}


def assistant(content="b", **more):
    return message("assistant", content) | more


QUESTION = message("user", "a")
CALL = {"id": "c1", "type": "function", "function": {"name": "sing", "arguments": '{"n": 1}'}}
