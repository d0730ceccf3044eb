"""The scores of all models on all benchmarks, and the comparisons between models, with their means."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from reprotune.comparison import intervals, significance, wording
from reprotune.comparison.scores import COMPARISONS, MEAN, MODELS, ModelScores, paired

Row = dict[str, Any]
"""`n`, the number of rows; for each model what `intervals.score` returns; for each comparison what
`significance.compared` returns, and `holm`, the corrected p."""
Rows = dict[str, Row]
"""A row for each benchmark, and MEAN, the last, for the mean over them."""


def table(
    benchmarks: Mapping[str, ModelScores], comparisons: Mapping[str, tuple[str, str]], seed: int
) -> Rows:
    """Compare models on each benchmark and in the mean; nothing without benchmarks.

    P-values are corrected in two families: all comparisons on benchmarks, and those of the mean.

    Args:
        benchmarks: by name.
        comparisons: two models each; the second is subtracted from the first.
    """
    if not benchmarks:
        return {}
    rows = {name: score_row(models) for name, models in benchmarks.items()}
    models = next(iter(benchmarks.values()))
    means = {model: intervals.mean_score([row[model] for row in rows.values()]) for model in models}
    rows[MEAN] = {"n": sum(row["n"] for row in rows.values()), **means}
    differences = {label: paired_on_all(benchmarks, *pair) for label, pair in comparisons.items()}
    on_benchmarks = {
        (name, label): [values] for label, strata in differences.items() for name, values in strata.items()
    }
    in_mean = {(MEAN, label): list(strata.values()) for label, strata in differences.items()}
    for family in (on_benchmarks, in_mean):
        for (name, label), comparison in tested(family, seed).items():
            rows[name][label] = comparison
    return rows


def score_row(models: ModelScores) -> Row:
    """The scores of one benchmark, without comparisons."""
    scores = {model: intervals.score(list(rows.values())) for model, rows in models.items()}
    return {"n": len(next(iter(models.values()))), **scores}


def paired_on_all(benchmarks: Mapping[str, ModelScores], first: str, second: str) -> dict[str, np.ndarray]:
    """The first model's scores minus the second's, (rows,), by benchmark."""
    return {name: paired(models[first], models[second], name) for name, models in benchmarks.items()}


def tested(
    family: Mapping[tuple[str, str], Sequence[np.ndarray]], seed: int
) -> dict[tuple[str, str], dict[str, float]]:
    """Test each comparison of a family, with p corrected for the family's size as `holm`."""
    results = {key: significance.compared(strata, seed, len(family)) for key, strata in family.items()}
    corrected = significance.holm({key: result["p"] for key, result in results.items()})
    return {key: result | {"holm": corrected[key]} for key, result in results.items()}


def share_of_gain(
    gain: Mapping[str, float], benchmarks: Mapping[str, ModelScores], seed: int
) -> dict[str, dict[str, float]]:
    """The shares of SFT and of DPO in the gain of the mean score; nothing where no gain is shown.

    Args:
        gain: the comparison of DPO with base in the mean.
        benchmarks: by name.
    """
    if gain["difference"] <= 0 or not significance.shown(gain):
        return {}
    differences = {
        label: list(paired_on_all(benchmarks, *pair).values()) for label, pair in COMPARISONS.items()
    }
    return {
        stage: intervals.share(differences[label], differences["dpo_vs_base"], seed)
        for stage, label in (("sft", "sft_vs_base"), ("dpo", "dpo_vs_sft"))
    }


def in_markdown(rows: Rows, models: Iterable[str], comparisons: Iterable[str]) -> str:
    """Scores, and differences with their intervals and corrected p."""
    header = ["benchmark", "n", *models, *comparisons]
    lines = [header, ["---"] * len(header)]
    for name, row in rows.items():
        scores = [f"{wording.percent(row[model]['score']):.1f}" for model in models]
        differences = [wording.difference_and_p(row[label]) for label in comparisons]
        lines.append([name, f"{row['n']:,}", *scores, *differences])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bars(rows: Rows) -> list[dict[str, Any]]:
    """The data of the plot `.dvc/plots/scores.json`."""
    return [
        {"benchmark": name, "model": model, **row[model]} for name, row in rows.items() for model in MODELS
    ]
