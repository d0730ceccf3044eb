"""Which rows are trained on: limits, weights, duplicates and contamination, drawn by the seed alone."""

import random
from time import monotonic

import numpy as np
import pytest

from reprotune.data import duplicates
from reprotune.data.contamination import MATCH
from reprotune.data.selection import hold_out
from reprotune.data.shards import read_shards
from reprotune.errors import InputError
from reprotune.records import write_parquet
from tests import steps
from tests.conftest import changed
from tests.data.examples import examples, expected_examples
from tests.tiny import WORDS, alpaca_rows, preference_rows


def test_near_duplicates_leave_when_asked_to(settings, model, tmp_path):
    first = {
        "instruction": (
            "red blue green one two three four big small cat dog bird tree house runs sings sleeps jumps"
        ),
        "input": "",
        "output": "the cat and the dog",
    }
    rows = [*alpaca_rows(), first, first | {"output": "the cat and the bird"}]
    for near, count in ((None, 0), (0.6, 1)):
        near_settings = changed(settings, {"tokenize.sft.deduplicate.near": near})
        account = steps.tokenize_sft(near_settings, model, rows, tmp_path)
        assert account["total"]["rows"]["near_duplicate"] == count
    assert steps.dropped(tmp_path) == [
        (41, "near_duplicate", f"nearly the text of {tmp_path}/raw_sft/rows.parquet, row 40")
    ]


def test_the_draw_follows_the_seed_alone(settings, model, tmp_path):
    def tokens(name, seed):
        steps.tokenize_sft(changed(settings, {"seed": seed}), model, alpaca_rows(), tmp_path / name)
        return steps.content(tmp_path / name / "sft_tokens")

    assert tokens("a", 1) == tokens("b", 1) != tokens("c", 2)


def test_several_sources_give_what_their_mix_says(settings, model, tokenizer, tmp_path):
    """Limits and weights by source, in any format; a change in one source leaves the draw of others alone."""
    many = alpaca_rows(60)
    chats = [
        {"conversations": [{"from": "human", "value": f"cat {n}"}, {"from": "gpt", "value": f"dog {n}"}]}
        for n in range(20)
    ]
    write_parquet(tmp_path / "raw_sft" / "chats.parquet", chats)

    def run(chat_weight):
        """The account, and the training examples."""
        source = {"kind": "local", "path": "-", "sha256": "0" * 64}
        data = {
            "sources": {
                "rows": {"source": source, "format": "alpaca", "ignore": []},
                "chats": {"source": source, "format": "sharegpt", "ignore": []},
            },
            "mix": {
                "rows": {"limit": 30, "weight": 0.5},
                "chats": {"limit": None, "weight": chat_weight},
            },
            "exclude_contaminated": False,
        }
        account = steps.tokenize_sft(changed(settings, {"data.sft": data}), model, many, tmp_path)
        return account, examples(tmp_path / "sft_tokens", "train")

    account, train = run(2.5)
    rows, chat = (account["sources"][name]["rows"] for name in ("rows", "chats"))
    assert rows["raw"] == 60 and rows["over_limit"] == 30 and rows["held_out"] + chat["held_out"] == 6
    assert rows["train"] == rows["seen"] == round(0.5 * (30 - rows["held_out"]))
    assert rows["not_drawn"] == 30 - rows["held_out"] - rows["train"]
    assert chat["train"] == 20 - chat["held_out"]
    assert chat["seen"] == 2 * chat["train"] + round(0.5 * chat["train"])
    times_seen = {train.count(example) for example in expected_examples(tokenizer, chats, "sharegpt")}
    assert times_seen in ({0, 2, 3}, {2, 3})
    expected = expected_examples(tokenizer, many)
    drawn = sorted(example for example in expected if example in train)
    _, train = run(1.0)
    assert sorted(example for example in expected if example in train) == drawn


def test_contaminated_rows_leave_when_asked_to(settings, model, tmp_path):
    def tokenize(exclude):
        excluding = changed(settings, {"data.sft.exclude_contaminated": exclude})
        return steps.tokenize_sft(excluding, model, alpaca_rows(), tmp_path)

    expected = r"contamination: no \*\.parquet, expected a file for each benchmark"
    with pytest.raises(InputError, match=expected):
        tokenize(True)
    match = {"doc_id": 5, "data": "sft", "source": "rows", "row": 3, "coverage": 1.0, "longest": 20}
    matches = [match, match | {"data": "preferences", "row": 4}]
    write_parquet(tmp_path / "contamination" / "gsm8k.parquet", matches, MATCH)
    for exclude, count in ((False, 0), (True, 1)):
        assert tokenize(exclude)["total"]["rows"]["contaminated"] == count
    assert steps.dropped(tmp_path) == [(3, "contaminated", "holds row 5 of gsm8k")]


def with_answers(rows, key, count):
    """Each row as many times as `count`, with another answer each time and the prompt in another spelling."""
    changed_rows = []
    for number, row in enumerate(rows):
        for time in range(count):
            answer = f"{WORDS[(number + time) % len(WORDS)]} {number} {time}"
            spelt = row | {"instruction": row["instruction"].upper() + " " * time} if time else row
            changed_rows.append(spelt | {key: answer})
    return changed_rows


def text_before(tokenizer, ids, end):
    return tokenizer.decode(ids[:end]).casefold().split()


def test_examples_that_share_a_prompt_are_on_one_side(settings, model, tokenizer, tmp_path):
    rows = [*with_answers(alpaca_rows(12), "output", 3), *alpaca_rows(40)[20:]]
    account = steps.tokenize_sft(settings, model, rows, tmp_path)
    prompts = {
        part: [
            tuple(text_before(tokenizer, ids, sum(label == -100 for label in labels)))
            for ids, labels in examples(tmp_path / "sft_tokens", part)
        ]
        for part in ("train", "held_out")
    }
    assert len(prompts["held_out"]) == 6 and len(prompts["train"]) == 50
    assert not set(prompts["train"]) & set(prompts["held_out"])
    assert account["prompts"] == [{"distinct": 32, "rows_that_share": 36}]


def test_later_turns_do_not_hide_a_prompt_that_is_shared(settings, model, tokenizer, tmp_path):
    turns = [[("human", f"cat {n // 2}"), ("gpt", f"dog {n}")] for n in range(40)]
    rows = [
        {
            "conversations": [
                {"from": role, "value": text} for role, text in [*both, ("human", f"x {n}"), ("gpt", "y")]
            ]
        }
        for n, both in enumerate(turns)
    ]
    chats = changed(settings, {"data.sft.sources.rows.format": "sharegpt"})
    steps.tokenize_sft(chats, model, rows, tmp_path)
    firsts = [
        {tokenizer.decode(ids).split("<|im_end|>")[0] for ids, _ in examples(tmp_path / "sft_tokens", part)}
        for part in ("train", "held_out")
    ]
    assert len(firsts[1]) == 3 and not firsts[0] & firsts[1]


def test_a_prompt_is_known_in_another_form(settings, model, tmp_path):
    """An input apart or in the instruction, and calls with ids of their own."""
    apart = [{"instruction": f"say {n}", "input": f"cat {n}", "output": f"a {n}"} for n in range(12)]
    joined = [{"instruction": f"say {n}\n\ncat {n}", "input": "", "output": f"b {n}"} for n in range(12)]
    account = steps.tokenize_sft(settings, model, [*apart, *joined], tmp_path)
    assert account["prompts"] == [{"distinct": 12, "rows_that_share": 24}]
    chats = changed(settings, {"data.sft.sources.rows.format": "messages"})
    called = [
        {
            "messages": [
                {"role": "user", "content": f"call {n // 2}"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": f"call_{n}", "function": {"name": "f", "arguments": "{}"}}],
                },
            ]
        }
        for n in range(24)
    ]
    account = steps.tokenize_sft(chats, model, called, tmp_path)
    assert account["total"]["rows"]["duplicate"] == 12


def test_a_row_that_is_trained_on_elsewhere_is_no_duplicate(settings, model, tmp_path):
    def row(n, **said):
        turns = [("user", f"cat {n}?"), ("assistant", "wrong"), ("user", "no"), ("assistant", "right")]
        messages = [{"role": role, "content": text} for role, text in turns]
        messages[1] |= said
        return {"messages": messages}

    chats = changed(settings, {"data.sft.sources.rows.format": "messages"})
    rows = [row(n, weight=weight) for n in range(12) for weight in (0, 1)]
    assert steps.tokenize_sft(chats, model, rows, tmp_path)["total"]["rows"]["duplicate"] == 0
    again = steps.tokenize_sft(chats, model, [*rows, row(0, train=False)], tmp_path)
    assert again["total"]["rows"]["duplicate"] == 1


def test_prompts_that_are_alike_in_a_chain_are_one_group():
    words = [f"{random.Random(n).random()}" for n in range(300)]
    texts = [" ".join(words[start : start + 200]) for start in range(0, 100, 20)]
    signatures = np.stack([duplicates.signature(text) for text in texts])
    first, second, *_, last = signatures
    assert np.mean(first == second) > 0.7 > np.mean(first == last)
    assert duplicates.near_groups(signatures, 0.7).tolist() == [0] * 5
    assert len(set(duplicates.near(signatures, 0.7))) > 1


def test_many_prompts_that_are_alike_are_grouped_in_no_time():
    words = " ".join(f"{random.Random(n).random()}" for n in range(60))
    signatures = np.stack([duplicates.signature(f"{words} and {n} or {7 * n}") for n in range(4_000)])
    begin = monotonic()
    assert not duplicates.near_groups(signatures, 0.8).any()
    # a quarter of a second on a quiet machine; comparing each with all takes a minute
    assert monotonic() - begin < 10


def test_a_system_prompt_and_tools_make_no_prompts_alike(settings, model, tmp_path):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"of": " ".join(WORDS)}}}
    rows = [
        {
            "system": " ".join(WORDS * 3),
            "tools": [tool],
            "messages": [
                {"role": "user", "content": f"{WORDS[n % 7]} {n}"},
                {"role": "assistant", "content": f"{WORDS[n % 5]} {n}"},
            ],
        }
        for n in range(12)
    ]
    chats = {
        "data.sft.sources.rows.format": "messages",
        "tokenize.sft.deduplicate.near": 0.8,
        "tokenize.sft.max_length": 1024,
    }
    account = steps.tokenize_sft(changed(settings, chats), model, rows, tmp_path)
    assert account["prompts"] == [{"distinct": 12, "rows_that_share": 0}]
    assert account["total"]["rows"]["near_duplicate"] == 0


@pytest.mark.parametrize(
    ("prompts", "count", "expected"),
    [
        ([0, 1, 2, 3], 2, [0, 1]),
        # the pair would leave no room for the three
        ([0, 0, 2, 2, 2], 3, [2, 3, 4]),
        ([0, 0, 2, 3, 3], 3, [0, 1, 2]),
        ([0, 0, 2, 2, 4, 4], 3, "found 3, expected 2 or 4"),
        ([0, 0, 0, 0, 4], 2, "found 2, expected 1 or 4"),
        ([0, 0, 0, 0], 3, "found 3, but all rows have the same prompt"),
    ],
)
def test_whole_prompts_are_held_out(prompts, count, expected):
    order = np.arange(len(prompts))
    if isinstance(expected, list):
        assert hold_out(np.array(prompts), order, count, "tokenize.sft") == expected
    else:
        with pytest.raises(InputError, match=rf"tokenize\.sft\.held_out: {expected}: rows with"):
            hold_out(np.array(prompts), order, count, "tokenize.sft")


def test_pairs_that_share_a_prompt_are_on_one_side(settings, model, tmp_path):
    rows = [
        row | {"chosen": {"from": "gpt", "value": f"red {time}"}}
        for row in preference_rows()
        for time in range(2)
    ]
    account = steps.tokenize_dpo(settings, model, rows, tmp_path)
    prompts = [
        {tuple(row["prompt_ids"]) for row in read_shards(tmp_path / "dpo_tokens", part)}
        for part in ("train", "held_out")
    ]
    assert len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    assert account["prompts"] == [{"distinct": 24, "rows_that_share": 48}]
    odd = changed(settings, {"tokenize.dpo.held_out": 5})
    with pytest.raises(InputError, match=r"tokenize\.dpo\.held_out: found 5, expected 4 or 6: rows with"):
        steps.tokenize_dpo(odd, model, rows, tmp_path)


def test_prompts_that_are_nearly_the_same_are_on_one_side_when_asked_to(settings, model, tokenizer, tmp_path):
    def words(seed):
        return " ".join(random.Random(seed).choices(WORDS, k=30))

    far = [
        {"instruction": f"{words(n // 2)}{' now' * (n % 2)}", "output": words(f"answer {n}")}
        for n in range(24)
    ]
    split = {}
    for near in (None, 0.6):
        near_settings = changed(settings, {"tokenize.sft.deduplicate.near": near})
        account = steps.tokenize_sft(near_settings, model, far, tmp_path)
        split[near] = account["prompts"][0]
        assert account["total"]["rows"]["near_duplicate"] == 0
    assert split[None] == {"distinct": len(far), "rows_that_share": 0}
    assert split[0.6] == {"distinct": len(far) // 2, "rows_that_share": len(far)}
