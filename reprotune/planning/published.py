"""Published sizes of data sets and benchmarks, for rows that are not here yet."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from reprotune import params
from reprotune.errors import InputError


class BenchmarkSize(NamedTuple):
    """Token counts are SmolLM2's."""

    rows: int
    """Of the scored split."""
    answers: int
    """Choices of a row; 1 if it generates."""
    question: int
    """Tokens, on average."""
    answer: int
    """Tokens, on average."""
    longest: int
    """Tokens of the longest question with its answer."""
    generated: int
    """Tokens generated at most; 0 if it chooses."""


BENCHMARKS = {
    "arc_challenge": BenchmarkSize(1_172, 4, 31, 6, 175, 0),
    "commonsense_qa": BenchmarkSize(1_221, 5, 44, 1, 94, 0),
    "gsm8k": BenchmarkSize(1_319, 1, 67, 127, 193, 256),
    "hellaswag": BenchmarkSize(10_042, 4, 50, 30, 155, 0),
    "winogrande": BenchmarkSize(1_267, 2, 17, 6, 39, 0),
}
SFT_ROWS = {"tatsu-lab/alpaca": (52_002, 100, 65)}
"""Rows, tokens of a row with its template, and tokens of its answer. The card gives 918 bytes a row, which
hold the text twice, the second time in a template of 190 characters."""
PAIRS = {"HuggingFaceH4/ultrafeedback_binarized": (61_135, 170, 315, 250)}
"""Pairs, and tokens of prompt, chosen and rejected. The card gives 6,636 bytes a row, which hold the prompt
four times and the chosen answer twice."""


def mixture(
    data: params.SftData | params.PreferencesData, sizes: Mapping[str, tuple[int, ...]], held_out: int
) -> tuple[float, list[float], str]:
    """Training rows of a mixture, average tokens of a row as in `sizes`, and where both come from, in words.

    Raises:
        InputError: a source's size is not known, or all rows are held out.
    """
    rows, weights, tokens, names = [], [], [], []
    for name, entry in data.sources.items():
        repo = entry.source.repo if isinstance(entry.source, params.HubSource) else None
        if repo is None or repo not in sizes:
            raise InputError(
                f"data: {name} is not tokenized with these params yet, and its size is not known; "
                "`dvc repro tokenize_sft tokenize_dpo` needs no GPU"
            )
        count, *row_tokens = sizes[repo]
        rows.append(min(count, data.mix[name].limit or count))
        weights.append(data.mix[name].weight)
        tokens.append(row_tokens)
        names.append(repo)
    if held_out >= sum(rows):
        raise InputError(
            f"tokenize: held_out: found {held_out}, expected fewer than the {sum(rows)} rows that the "
            "mixture takes"
        )
    trained = np.array(rows) * (1 - held_out / sum(rows)) * np.array(weights)
    mean = [float(value) for value in np.average(np.array(tokens, float), axis=0, weights=trained)]
    source = f"published sizes of {', '.join(names)}; `dvc repro tokenize_sft tokenize_dpo` counts them"
    return float(trained.sum()), mean, source
