"""Which rows are trained on: limits, weights, duplicates and contamination, drawn by the seed alone."""

import pytest

from reprotune.data.contamination import MATCH
from reprotune.errors import InputError
from reprotune.records import write_parquet
from tests import steps
from tests.conftest import changed
from tests.data.examples import examples, expected_examples
from tests.tiny import alpaca_rows


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
                "rows": {"source": source, "format": "alpaca"},
                "chats": {"source": source, "format": "sharegpt"},
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
