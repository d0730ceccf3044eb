"""Planted benchmark rows are found, near misses are not."""

from argparse import Namespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import InputError, contamination
from stages.records import read_json, read_parquet, write_parquet
from tests import tiny
from tests.conftest import changed

FILLER = "nothing of this is in any benchmark at all whatever is asked of it"
ROWS = {
    "arc_challenge": "Which of these materials would let the most electric current flow through a closed circuit at room temperature",
    "commonsense_qa": "Where would you put a folding chair after the outdoor concert in the park has come to an end",
    "gsm8k": "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips in May",
    "hellaswag": "A man is standing on a ladder next to a tall house while he cleans the leaves out of the gutter with his",
    "winogrande": "The trophy would not fit into the brown suitcase that was in the hall because the _ was far too large for it",
}


def world(folder, settings, sft: list[str], preferences: list[str] = ()) -> dict:
    """Run the stage on the benchmark rows above and training rows with these answers."""
    for name, text in ROWS.items():
        _, rows = tiny.benchmark_rows()[name]
        column = settings.contamination.columns[name]
        planted = rows[0] | {column: text} | ({"option1": "trophy", "option2": "suitcase"} if name == "winogrande" else {})
        write_parquet(folder / "raw" / "benchmarks" / name / f"{settings.benchmarks[name].split}.parquet", [rows[1], planted])
    write_parquet(folder / "raw" / "sft" / "rows.parquet", [{"instruction": f"say {n}", "input": "", "output": text} for n, text in enumerate([FILLER, *sft])])
    pair = {"conversations": [{"from": "human", "value": "go"}], "rejected": {"from": "gpt", "value": "no"}}
    write_parquet(folder / "raw" / "preferences" / "pairs.parquet", [pair | {"chosen": {"from": "gpt", "value": text}} for text in [FILLER, *preferences]])
    contamination.run(settings, Namespace(raw=folder / "raw", out=folder / "out", metrics=folder / "metrics.json"))
    return {name: read_parquet(folder / "out" / f"{name}.parquet").to_pylist() for name in ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_a_planted_row_is_found_in_either_data(name, settings, tmp_path):
    text = ROWS[name].replace("_", "trophy")
    planted = f"Here it comes: {text.upper().replace(' ', ',  ')}!! And on."
    found = world(tmp_path, settings, [planted], [planted])
    assert [(row["doc_id"], row["data"], row["source"], row["row"]) for row in found[name]] == [(1, "preferences", "pairs", 1), (1, "sft", "rows", 1)]
    assert all(row["coverage"] == 1.0 and row["longest"] == len(text.split()) for row in found[name])
    assert not any(rows for other, rows in found.items() if other != name)
    metrics = read_json(tmp_path / "metrics.json")
    (counts,) = [row for row in metrics["benchmarks"] if row["benchmark"] == name]
    assert counts["rows_contaminated"] == counts["rows_with_13_gram"] == metrics["contaminated"] == 1
    assert metrics["training"] == [{"source": source, "rows": 2, "rows_contaminated": 1} for source in ("sft.rows", "preferences.pairs")]


@pytest.mark.parametrize("name", ROWS)
def test_a_near_miss_is_not(name, settings, tmp_path):
    words = ROWS[name].replace("_", "trophy").split()
    eight = " ".join(words[:8])
    every_eighth = " ".join("other" if index % 8 == 7 else word for index, word in enumerate(words))
    apart = " ".join([*words[:7], "but", *words[7:14], "but", *words[14:]])
    assert world(tmp_path, settings, [eight, every_eighth, apart, " ".join(reversed(words))])[name] == []


def test_coverage_and_runs_each_decide(settings, tmp_path):
    words = ROWS["gsm8k"].split()
    ten = " ".join(words[:10])
    thirteen, twelve = " ".join(words[:13]), " ".join(words[:12])
    assert len(words) == 21
    found = world(tmp_path / "half", settings, [ten, twelve])["gsm8k"]
    assert [(row["row"], round(row["coverage"], 3), row["longest"]) for row in found] == [(2, round(12 / 21, 3), 12)]
    strict = changed(settings, {"contamination.coverage": 0.9})
    assert [row["row"] for row in world(tmp_path / "strict", strict, [ten, twelve, thirteen])["gsm8k"]] == [3]


def test_a_run_at_the_very_start_of_a_batch_counts_whole(settings, tmp_path):
    """Row 0, first text: no word stands before it."""
    words = ROWS["gsm8k"].split()
    world(tmp_path, settings, [])
    start = {"instruction": " ".join(words[:13]), "input": "", "output": "yes"}
    write_parquet(tmp_path / "raw" / "sft" / "rows.parquet", [start])
    contamination.run(changed(settings, {"contamination.coverage": 0.9}), Namespace(raw=tmp_path / "raw", out=tmp_path / "out", metrics=tmp_path / "metrics.json"))
    (match,) = read_parquet(tmp_path / "out" / "gsm8k.parquet").to_pylist()
    assert (match["row"], match["longest"]) == (0, 13)


@pytest.mark.parametrize("parted", [False, True])
def test_words_of_two_texts_make_no_n_gram(parted, settings, tmp_path):
    words = ROWS["gsm8k"].split()
    world(tmp_path, settings, [])
    half = {"instruction": " ".join(words[:7]), "input": "", "output": " ".join(words[7:14])}
    whole = {"instruction": "say", "input": "", "output": " ".join(words[:14])}
    write_parquet(tmp_path / "raw" / "sft" / "rows.parquet", [half if parted else whole])
    contamination.run(changed(settings, {"contamination.coverage": 0.3}), Namespace(raw=tmp_path / "raw", out=tmp_path / "out", metrics=tmp_path / "metrics.json"))
    assert len(read_parquet(tmp_path / "out" / "gsm8k.parquet")) == (0 if parted else 1)


def test_a_row_with_one_long_filling_is_searched(settings, tmp_path):
    world(tmp_path, settings, [])
    file = tmp_path / "raw" / "benchmarks" / "winogrande" / "validation.parquet"
    row = {"sentence": "At the old gate _ met him twice", "option1": "Al", "option2": "the very nice tall neighbour", "answer": "1"}
    write_parquet(file, [row])
    text = row["sentence"].replace("_", row["option2"])
    write_parquet(tmp_path / "raw" / "sft" / "rows.parquet", [{"instruction": "say", "input": "", "output": text}])
    contamination.run(settings, Namespace(raw=tmp_path / "raw", out=tmp_path / "out", metrics=tmp_path / "metrics.json"))
    assert len(read_parquet(tmp_path / "out" / "winogrande.parquet")) == 1
    assert read_json(tmp_path / "metrics.json")["benchmarks"][-1]["rows_too_short"] == 0


def test_rows_too_short_to_judge_are_counted(settings, tmp_path):
    world(tmp_path, settings, ["hello"])
    first = read_json(tmp_path / "metrics.json")["benchmarks"][0]
    assert first["benchmark"] == "arc_challenge" and first["rows"] == 2 and first["rows_too_short"] == 1


def test_a_wrong_column_is_named(settings, tmp_path):
    world(tmp_path, settings, [])
    wrong = changed(settings, {"contamination.columns.gsm8k": "text"})
    with pytest.raises(InputError, match=r"contamination\.columns\.gsm8k: found 'text', expected a text column of .*test\.parquet: \['answer', 'question'\]"):
        contamination.run(wrong, Namespace(raw=tmp_path / "raw", out=tmp_path / "out", metrics=tmp_path / "metrics.json"))


def test_invalid_rows_are_not_searched(settings, tmp_path):
    found = world(tmp_path, settings, [FILLER])
    table = read_parquet(tmp_path / "raw" / "sft" / "rows.parquet")
    bad = table.append_column("_invalid", pa.array([None, "broken"])).set_column(2, "output", pa.array([FILLER, ROWS["gsm8k"]]))
    pq.write_table(bad, tmp_path / "raw" / "sft" / "rows.parquet")
    contamination.run(settings, Namespace(raw=tmp_path / "raw", out=tmp_path / "out", metrics=tmp_path / "metrics.json"))
    assert read_parquet(tmp_path / "out" / "gsm8k.parquet").to_pylist() == found["gsm8k"] == []
