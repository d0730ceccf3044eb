"""The run of the stage `compare`: base, SFT and DPO compared on all benchmarks."""

from pathlib import Path
from typing import Any

from reprotune import params
from reprotune.comparison.scores import (
    COMPARISONS,
    MEAN,
    MODELS,
    ModelScores,
    cell_files,
    check_protocols,
    read_cell,
)
from reprotune.comparison.table import Row, bars, in_markdown, share_of_gain, table
from reprotune.records import read_parquet, write_json, write_text

MIN_CLEAN_ROWS = 2
"""Clean rows that a benchmark needs: fewer have no variance."""


def run(
    settings: params.Params,
    metrics: Path,
    evals: Path,
    contamination: Path,
    summary: Path,
    markdown: Path,
    means: Path,
    plot: Path,
) -> None:
    """Compare the models and write the results in four forms.

    Args:
        summary: a JSON file. `all` has an entry for each benchmark and one for their mean. `clean` has the
            same without rows that are in the raw training data; it leaves out benchmarks with fewer than
            MIN_CLEAN_ROWS. `share_of_gain` is there only if a gain in the mean is shown.
        markdown: `all` as a table.
        means: a folder with the `headlines`, one metrics file each.
        plot: the scores of `all`, for `dvc plots`.
    """
    benchmarks, clean = {}, {}
    for name in settings.evaluate.benchmarks:
        benchmarks[name] = read_benchmark(name, metrics, evals)
        remaining = clean_rows(benchmarks[name], contamination / f"{name}.parquet")
        if len(remaining["base"]) >= MIN_CLEAN_ROWS:
            clean[name] = remaining
    rows = table(benchmarks, COMPARISONS, settings.seed)
    record: dict[str, Any] = {"all": rows, "clean": table(clean, COMPARISONS, settings.seed)}
    if shares := share_of_gain(rows[MEAN]["dpo_vs_base"], benchmarks, settings.seed):
        record["share_of_gain"] = shares
    write_json(summary, record)
    write_text(markdown, in_markdown(rows, MODELS, COMPARISONS))
    for name, headline in headlines(rows[MEAN]).items():
        write_json(means / f"{name}.json", headline)
    write_json(plot, bars(rows))


def read_benchmark(name: str, metrics: Path, evals: Path) -> ModelScores:
    files = {model: cell_files(name, model, metrics, evals) for model in MODELS}
    cells = {model: read_cell(*pair) for model, pair in files.items()}
    check_protocols({str(files[model][0]): record for model, (record, _) in cells.items()})
    return {model: scores for model, (_, scores) in cells.items()}


def clean_rows(models: ModelScores, matches: Path) -> ModelScores:
    """The scores without those of contaminated rows.

    Args:
        matches: the contaminated rows, as `contamination` writes them.
    """
    contaminated = set(read_parquet(matches)["doc_id"].to_pylist())
    return {
        model: {row: score for row, score in scores.items() if row not in contaminated}
        for model, scores in models.items()
    }


def headlines(mean: Row) -> dict[str, dict[str, float]]:
    """What `dvc metrics` shows: each model's mean score, each comparison's difference and corrected p."""
    scores = {model: {"score": mean[model]["score"], "n": mean["n"]} for model in MODELS}
    differences = {
        label: {"difference": mean[label]["difference"], "p": mean[label]["holm"]} for label in COMPARISONS
    }
    return scores | differences
