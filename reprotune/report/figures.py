"""The six figures of the report, as SVG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from reprotune.comparison.scores import MEAN
from reprotune.comparison.significance import shown
from reprotune.comparison.table import Rows
from reprotune.comparison.wording import LEVEL_TEXT, percent
from reprotune.report.drawing import (
    CHANCE,
    COMPARISON_COLORS,
    GREEN,
    MODEL_COLORS,
    PURPLE,
    save,
    score_bar,
    score_legend,
    with_interval,
)
from reprotune.report.names import benchmark_name, comparison_names, model_names
from reprotune.report.translation import say


def training_pipeline(steps: Sequence[tuple[str, str]], path: Path) -> None:
    """A box for each (stage, what it did), with arrows between them."""
    figure = Figure(figsize=(7.2, 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, len(steps))
    axes.set_ylim(0, 1)
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#F2F2F2", "edgecolor": "#555555"}
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5, "linespacing": 1.3}
    for index, (stage, text) in enumerate(steps):
        axes.text(index + 0.5, 0.5, f"{stage}\n\n{text}", bbox=box, **style)
        if index:
            arrow = {"arrowstyle": "-|>", "color": "#555555"}
            axes.annotate("", xy=(index + 0.09, 0.5), xytext=(index - 0.07, 0.5), arrowprops=arrow)
    save(figure, path)


def comparison_bar(rows: Rows, chance: Mapping[str, float], path: Path) -> None:
    """The scores of all models on each benchmark, and what guessing would score."""
    benchmarks = [name for name in rows if name != MEAN]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for x, name in enumerate(benchmarks):
        for offset, model in enumerate(MODEL_COLORS):
            score_bar(axes, x + (offset - 1) * 0.27, 0.25, model, rows[name][model])
        if name in chance:
            axes.plot([x - 0.44, x + 0.44], [100 * chance[name]] * 2, **CHANCE)
    axes.set_xticks(range(len(benchmarks)), [benchmark_name(name) for name in benchmarks])
    score_legend(axes, model_names(), bool(chance))
    axes.set_ylim(0, 100)
    axes.set_ylabel(say("score, % (bars: {level} interval)", level=LEVEL_TEXT))
    save(figure, path)


def average_performance(rows: Rows, path: Path) -> None:
    """The mean score of each model."""
    figure = Figure(figsize=(3.5, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for x, model in enumerate(MODEL_COLORS):
        score = rows[MEAN][model]
        score_bar(axes, x, 0.6, model, score)
        axes.text(x, 100 * score["high"] + 2, f"{percent(score['score']):.1f}", ha="center")
    axes.set_xticks(range(len(MODEL_COLORS)), list(model_names().values()))
    axes.set_ylim(0, 100)
    axes.set_ylabel(say("mean score, % (bars: {level} interval)", level=LEVEL_TEXT))
    save(figure, path)


def improvement_chart(rows: Rows, path: Path) -> None:
    """The differences in points, hollow where the corrected test shows none."""
    names = list(rows)[::-1]
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for offset, (label, comparison) in enumerate(comparison_names().items()):
        color = COMPARISON_COLORS[label]
        axes.plot([], [], "o", ms=5, color=color, label=comparison)
        for y, name in enumerate(names):
            value = rows[name][label]
            center, errors = with_interval(value, "difference")
            axes.errorbar(
                center,
                y + (1 - offset) * 0.22,
                xerr=errors if value["better"] or value["worse"] else None,
                fmt="o",
                ms=5,
                lw=1,
                capsize=2,
                color=color,
                mfc=color if shown(value) else "white",
            )
    axes.axvline(0, color="black", lw=0.8, zorder=0)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -1), max(right, 1))
    axes.set_yticks(range(len(names)), [benchmark_name(name) for name in names])
    axes.set_xlabel(
        say(
            "difference, percentage points (bars: {level} interval, paired; hollow: no difference shown)",
            level=LEVEL_TEXT,
        )
    )
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, path)


def radar_chart(rows: Rows, chance: Mapping[str, float], path: Path) -> None:
    """Each model's scores on all benchmarks as a profile."""
    benchmarks = [name for name in rows if name != MEAN]
    angles = np.linspace(0, 2 * np.pi, len(benchmarks), endpoint=False)
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes)

    def closed(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        return np.append(angles, angles[0]), 100 * np.array([*values, values[0]])

    # widest first, so that models with equal scores can all be seen
    for width, (model, name) in zip((5, 3, 1.2), model_names().items(), strict=True):
        scores = [rows[benchmark][model]["score"] for benchmark in benchmarks]
        axes.plot(*closed(scores), color=MODEL_COLORS[model], lw=width, label=name)
    if chance:
        guessed = [chance.get(benchmark, 0.0) for benchmark in benchmarks]
        axes.plot(*closed(guessed), label=say("chance"), **CHANCE)
    axes.set_xticks(angles, [benchmark_name(name) for name in benchmarks])
    axes.tick_params(axis="x", pad=4)
    for text, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = np.cos(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.5 else "left" if side > 0 else "right")
    axes.set_ylim(0, 100)
    axes.set_rlabel_position(90 / len(benchmarks))
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), columnspacing=1)
    save(figure, path)


class Line(NamedTuple):
    """A quantity by optimizer step, on the rows trained on and on held-out rows."""

    trained: str
    """Its column in the curve of the rows trained on."""
    held_out: str
    """Its column in the held-out curve."""
    color: str
    name: str = ""
    """For the legend, where the panel has several."""


def training_curves(curves: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """SFT's loss; DPO's loss, reward margin and log-probs.

    Args:
        curves: the rows of `sft.csv`, `sft_held_out.csv`, `dpo.csv` and `dpo_held_out.csv`, by name.
    """
    sft, dpo = MODEL_COLORS["sft"], MODEL_COLORS["dpo"]
    log_probs = [
        Line("logps_chosen", "chosen_log_prob", GREEN, say("chosen")),
        Line("logps_rejected", "rejected_log_prob", PURPLE, say("rejected")),
    ]
    panels = [
        (say("SFT loss, nats a token"), "sft", [Line("loss", "loss", sft)]),
        (say("DPO loss, nats a pair"), "dpo", [Line("loss", "loss", dpo)]),
        (say("DPO reward margin"), "dpo", [Line("reward_margin", "reward_margin", dpo)]),
        (say("DPO log-prob, nats"), "dpo", log_probs),
    ]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    for axes, (title, stage, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for line in lines:
            training_line(axes, line, curves[stage], curves[f"{stage}_held_out"])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(say("optimizer step"))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def training_line(
    axes: Axes, line: Line, trained: list[dict[str, float]], held_out: list[dict[str, float]]
) -> None:
    """A line for the rows trained on, and points for held-out rows."""
    axes.plot(
        [row["step"] for row in trained],
        [row[line.trained] for row in trained],
        color=line.color,
        lw=1,
        label=line.name or say("trained on"),
    )
    axes.plot(
        [row["step"] for row in held_out],
        [row[line.held_out] for row in held_out],
        "o--",
        ms=4,
        lw=1,
        color=line.color,
        mfc="white",
        label=None if line.name else say("held out"),
    )
