"""Planted benchmark rows are found, near misses are not."""

from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reprotune.data import contamination
from reprotune.errors import InputError
from reprotune.records import read_metrics, read_parquet, write_parquet
from tests import tiny
from tests.conftest import changed

FILLER = "nothing of this is in any benchmark at all whatever is asked of it"
ROWS = {
    "arc_challenge": (
        "Which of these materials would let the most electric current flow through a closed circuit "
        "at room temperature"
    ),
    "commonsense_qa": (
        "Where would you put a folding chair after the outdoor concert in the park has come to an end"
    ),
    "gsm8k": (
        "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips "
        "in May"
    ),
    "hellaswag": (
        "A man is standing on a ladder next to a tall house while he cleans the leaves out of the gutter "
        "with his"
    ),
    "winogrande": (
        "The trophy would not fit into the brown suitcase that was in the hall because the _ was far too "
        "large for it"
    ),
}


def run(folder: Path, settings) -> None:
    contamination.run(
        settings, Namespace(raw=folder / "raw", out=folder / "out", metrics=folder / "metrics.json")
    )


def matches_of(folder: Path, name: str) -> list[dict]:
    return read_parquet(folder / "out" / f"{name}.parquet").to_pylist()


def write_sft(folder: Path, rows: list[dict]) -> None:
    write_parquet(folder / "raw" / "sft" / "rows.parquet", rows)


def run_on(folder: Path, settings, sft: list[str], preferences: list[str] = ()) -> dict[str, list[dict]]:
    """Run the stage on ROWS and on training rows with these completions; returns the matches."""
    for name, text in ROWS.items():
        _, rows = tiny.benchmark_rows()[name]
        planted = rows[0] | {settings.contamination.columns[name]: text}
        if name == "winogrande":
            planted |= {"option1": "trophy", "option2": "suitcase"}
        split = settings.benchmarks[name].split
        write_parquet(folder / "raw" / "benchmarks" / name / f"{split}.parquet", [rows[1], planted])
    write_sft(
        folder,
        [{"instruction": f"say {n}", "input": "", "output": text} for n, text in enumerate([FILLER, *sft])],
    )
    pair = {"conversations": [{"from": "human", "value": "go"}], "rejected": {"from": "gpt", "value": "no"}}
    write_parquet(
        folder / "raw" / "preferences" / "pairs.parquet",
        [pair | {"chosen": {"from": "gpt", "value": text}} for text in [FILLER, *preferences]],
    )
    run(folder, settings)
    return {name: matches_of(folder, name) for name in ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_a_planted_row_is_found_in_either_data(name, settings, tmp_path):
    text = ROWS[name].replace("_", "trophy")
    planted = f"Here it comes: {text.upper().replace(' ', ',  ')}!! And on."
    matches = run_on(tmp_path, settings, [planted], [planted])
    assert [(row["doc_id"], row["data"], row["source"], row["row"]) for row in matches[name]] == [
        (1, "preferences", "pairs", 1),
        (1, "sft", "rows", 1),
    ]
    assert all(row["coverage"] == 1.0 and row["longest"] == len(text.split()) for row in matches[name])
    assert not any(rows for benchmark, rows in matches.items() if benchmark != name)
    metrics = read_metrics(tmp_path / "metrics.json")
    (counts,) = [row for row in metrics["benchmarks"] if row["benchmark"] == name]
    assert counts["rows_contaminated"] == counts["rows_with_13_gram"] == metrics["contaminated"] == 1
    assert metrics["training"] == [
        {"source": source, "rows": 2, "rows_contaminated": 1} for source in ("sft.rows", "preferences.pairs")
    ]


@pytest.mark.parametrize("name", ROWS)
def test_a_near_miss_is_not(name, settings, tmp_path):
    words = ROWS[name].replace("_", "trophy").split()
    eight = " ".join(words[:8])
    every_eighth = " ".join("other" if index % 8 == 7 else word for index, word in enumerate(words))
    apart = " ".join([*words[:7], "but", *words[7:14], "but", *words[14:]])
    backwards = " ".join(reversed(words))
    assert run_on(tmp_path, settings, [eight, every_eighth, apart, backwards])[name] == []


def test_coverage_and_runs_each_decide(settings, tmp_path):
    words = ROWS["gsm8k"].split()
    ten, twelve, thirteen = (" ".join(words[:count]) for count in (10, 12, 13))
    assert len(words) == 21
    (match,) = run_on(tmp_path / "half", settings, [ten, twelve])["gsm8k"]
    assert (match["row"], match["longest"]) == (2, 12) and match["coverage"] == pytest.approx(12 / 21)
    strict = changed(settings, {"contamination.coverage": 0.9})
    matches = run_on(tmp_path / "strict", strict, [ten, twelve, thirteen])["gsm8k"]
    assert [row["row"] for row in matches] == [3]


def test_a_run_at_the_very_start_of_a_batch_counts_whole(settings, tmp_path):
    """Row 0, first text: no word stands before it."""
    words = ROWS["gsm8k"].split()
    run_on(tmp_path, settings, [])
    write_sft(tmp_path, [{"instruction": " ".join(words[:13]), "input": "", "output": "yes"}])
    run(tmp_path, changed(settings, {"contamination.coverage": 0.9}))
    (match,) = matches_of(tmp_path, "gsm8k")
    assert (match["row"], match["longest"]) == (0, 13)


@pytest.mark.parametrize("parted", [False, True])
def test_words_of_two_texts_make_no_n_gram(parted, settings, tmp_path):
    words = ROWS["gsm8k"].split()
    run_on(tmp_path, settings, [])
    half = {"instruction": " ".join(words[:7]), "input": "", "output": " ".join(words[7:14])}
    whole = {"instruction": "say", "input": "", "output": " ".join(words[:14])}
    write_sft(tmp_path, [half if parted else whole])
    run(tmp_path, changed(settings, {"contamination.coverage": 0.3}))
    assert len(matches_of(tmp_path, "gsm8k")) == (0 if parted else 1)


def test_a_row_with_one_long_filling_is_searched(settings, tmp_path):
    run_on(tmp_path, settings, [])
    row = {
        "sentence": "At the old gate _ met him twice",
        "option1": "Al",
        "option2": "the very nice tall neighbour",
        "answer": "1",
    }
    write_parquet(tmp_path / "raw" / "benchmarks" / "winogrande" / "validation.parquet", [row])
    text = row["sentence"].replace("_", row["option2"])
    write_sft(tmp_path, [{"instruction": "say", "input": "", "output": text}])
    run(tmp_path, settings)
    assert len(matches_of(tmp_path, "winogrande")) == 1
    assert read_metrics(tmp_path / "metrics.json")["benchmarks"][-1]["rows_too_short"] == 0


def test_rows_too_short_to_judge_are_counted(settings, tmp_path):
    run_on(tmp_path, settings, ["hello"])
    first = read_metrics(tmp_path / "metrics.json")["benchmarks"][0]
    assert first["benchmark"] == "arc_challenge" and first["rows"] == 2 and first["rows_too_short"] == 1


def test_a_wrong_column_is_named(settings, tmp_path):
    run_on(tmp_path, settings, [])
    expected = (
        r"contamination\.columns\.gsm8k: found 'text', "
        r"expected a text column of .*test\.parquet: \['answer', 'question'\]"
    )
    with pytest.raises(InputError, match=expected):
        run(tmp_path, changed(settings, {"contamination.columns.gsm8k": "text"}))


def test_invalid_rows_are_not_searched(settings, tmp_path):
    run_on(tmp_path, settings, [FILLER])
    file = tmp_path / "raw" / "sft" / "rows.parquet"
    table = read_parquet(file).set_column(2, "output", pa.array([FILLER, ROWS["gsm8k"]]))
    pq.write_table(table, file)
    run(tmp_path, settings)
    assert [row["row"] for row in matches_of(tmp_path, "gsm8k")] == [1], "a valid row is found"
    pq.write_table(table.append_column("_invalid", pa.array([None, "broken"])), file)
    run(tmp_path, settings)
    assert matches_of(tmp_path, "gsm8k") == []
