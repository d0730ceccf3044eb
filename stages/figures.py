"""The report's figures, as SVG files without dates: same numbers, same bytes.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and a model has the same one everywhere. Letters are drawn as outlines, so that they look alike
everywhere, Chinese ones included.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.language import say
from stages.statistics import shown

COLORS = {"base": "#999999", "sft": "#0072B2", "dpo": "#D55E00"}
COMPARISON_COLORS = {"sft_vs_base": "#0072B2", "dpo_vs_sft": "#E69F00", "dpo_vs_base": "#D55E00"}
NAMES = {
    "arc_challenge": "ARC-Challenge", "boolq": "BoolQ", "commonsense_qa": "CommonsenseQA", "gsm8k": "GSM8K", "hellaswag": "HellaSwag", "humaneval": "HumanEval",
    "ifeval": "IFEval", "mmlu": "MMLU", "openbookqa": "OpenBookQA", "piqa": "PIQA", "truthfulqa": "TruthfulQA", "winogrande": "WinoGrande",
}  # fmt: skip

# whatever a user's own settings are
matplotlib.rcdefaults()
matplotlib.use("Agg")
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "reprotune"})


def use_font(language: str) -> None:
    """One that has the language's letters; Noto Sans SC comes with the package zhplot."""
    matplotlib.rcParams["font.family"] = ["DejaVu Sans"]
    if language == "zh":
        (folder,) = find_spec("zhplot").submodule_search_locations
        file = Path(folder) / "fonts" / "NotoSansSC-Regular.ttf"
        font_manager.fontManager.addfont(file)
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", font_manager.FontProperties(fname=file).get_name()]


def labels() -> dict[str, str]:
    return {"base": say("base"), "sft": say("SFT"), "dpo": say("SFT + DPO")}


def comparisons() -> dict[str, str]:
    return {"sft_vs_base": say("SFT − base"), "dpo_vs_sft": say("DPO − SFT"), "dpo_vs_base": say("SFT + DPO − base")}


def pretty(name: str) -> str:
    return say("mean") if name == "mean" else NAMES.get(name, name)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def training_pipeline(steps: list[tuple[str, str]], path: Path) -> None:
    """A box for each (stage, what it did), with arrows between."""
    figure = Figure(figsize=(7.2, 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, len(steps))
    axes.set_ylim(0, 1)
    for index, (stage, text) in enumerate(steps):
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#F2F2F2", "edgecolor": "#555555"}
        axes.text(index + 0.5, 0.5, f"{stage}\n\n{text}", ha="center", va="center", fontsize=6.5, bbox=box, linespacing=1.3)
        if index:
            arrow = {"arrowstyle": "-|>", "color": "#555555"}
            axes.annotate("", xy=(index + 0.09, 0.5), xytext=(index - 0.07, 0.5), arrowprops=arrow)
    save(figure, path)


def interval(value: Mapping[str, float], name: str) -> tuple[float, list[list[float]]]:
    """What is shown, in percent, and the lengths of its interval below and above."""
    middle = 100 * value[name]
    # a quantile of resampled means may stand a hair on the other side
    return middle, [[abs(middle - 100 * value["low"])], [abs(100 * value["high"] - middle)]]


def scores(axes: Axes, place: float, width: float, model: str, value: Mapping[str, float]) -> None:
    """A bar with its interval, in the model's colour."""
    height, errors = interval(value, "score")
    axes.bar(place, height, width, yerr=errors, color=COLORS[model], capsize=2, error_kw={"lw": 0.8})


def comparison_bar(rows: dict[str, Any], chance: Mapping[str, float], path: Path) -> None:
    """Score of each model on each benchmark, in percent, with 95% intervals, and what guessing would give."""
    names = [name for name in rows if name != "mean"]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        for offset, model in enumerate(COLORS):
            scores(axes, place + (offset - 1) * 0.27, 0.25, model, rows[name][model])
        if name in chance:
            axes.plot([place - 0.44, place + 0.44], [100 * chance[name]] * 2, color="black", lw=1, ls=(0, (4, 2)))
    axes.set_xticks(range(len(names)), [pretty(name) for name in names])
    legend(axes, labels(), bool(chance))
    axes.set_ylim(0, 100)
    axes.set_ylabel(say("score, % (bars: 95% interval)"))
    save(figure, path)


def legend(axes: Axes, of: Mapping[str, str], chance: bool) -> None:
    for model, label in of.items():
        axes.bar(0, 0, 0, color=COLORS[model], label=label)
    if chance:
        axes.plot([], [], color="black", lw=1, ls=(0, (4, 2)), label=say("chance"))
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def average_performance(rows: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(3.5, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for place, model in enumerate(COLORS):
        value = rows["mean"][model]
        scores(axes, place, 0.6, model, value)
        axes.text(place, 100 * value["high"] + 2, f"{round(100 * value['score'], 6):.1f}", ha="center")
    axes.set_xticks(range(len(COLORS)), labels().values())
    axes.set_ylim(0, 100)
    axes.set_ylabel(say("mean score, % (bars: 95% interval)"))
    save(figure, path)


def improvement_chart(rows: dict[str, Any], path: Path) -> None:
    """Paired differences in points with 95% intervals, hollow where the corrected test shows nothing."""
    names = list(rows)[::-1]
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for offset, (label, text) in enumerate(comparisons().items()):
        color = COMPARISON_COLORS[label]
        axes.plot([], [], "o", ms=5, color=color, label=text)
        for place, name in enumerate(names):
            value = rows[name][label]
            middle, errors = interval(value, "difference")
            axes.errorbar(
                middle, place + (1 - offset) * 0.22, xerr=errors if value["better"] or value["worse"] else None,
                fmt="o", ms=5, lw=1, capsize=2, color=color, mfc=color if shown(value) else "white",
            )  # fmt: skip
    axes.axvline(0, color="black", lw=0.8, zorder=0)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -1), max(right, 1))
    axes.set_yticks(range(len(names)), [pretty(name) for name in names])
    axes.set_xlabel(say("difference, percentage points (bars: 95% interval, paired; hollow: no difference shown)"))
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, path)


def radar_chart(rows: dict[str, Any], chance: Mapping[str, float], path: Path) -> None:
    names = [name for name in rows if name != "mean"]
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.add_subplot(projection="polar")

    def line(values: Sequence[float], **style: Any) -> None:
        axes.plot(np.append(angles, angles[0]), 100 * np.array([*values, values[0]]), **style)

    # the widest below, so that models with equal scores are all seen
    for width, (model, label) in zip((5, 3, 1.2), labels().items(), strict=True):
        line([rows[name][model]["score"] for name in names], color=COLORS[model], lw=width, label=label)
    if chance:
        line([chance.get(name, 0.0) for name in names], color="black", lw=1, ls=(0, (4, 2)), label=say("chance"))
    axes.set_xticks(angles, [pretty(name) for name in names])
    axes.tick_params(axis="x", pad=4)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = np.cos(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.5 else "left" if side > 0 else "right")
    axes.set_ylim(0, 100)
    axes.set_rlabel_position(90 / len(names))
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), columnspacing=1)
    save(figure, path)


def training_curves(curves: Mapping[str, list[dict[str, float]]], path: Path) -> None:
    """By optimizer step: SFT's loss, DPO's loss, reward margin and log-probs, of the rows trained on as lines and of held-out ones as points.

    Args:
        curves: the rows of `sft.csv`, `sft_held_out.csv`, `dpo.csv` and `dpo_held_out.csv`, by their names.
    """
    panels = (
        (say("SFT loss, nats a token"), "sft", (("loss", "loss", COLORS["sft"], ""),)),
        (say("DPO loss, nats a pair"), "dpo", (("loss", "loss", COLORS["dpo"], ""),)),
        (say("DPO reward margin"), "dpo", (("reward_margin", "reward_margin", COLORS["dpo"], ""),)),
        (say("DPO log-prob, nats"), "dpo", (("logps_chosen", "chosen_log_prob", "#009E73", say("chosen")), ("logps_rejected", "rejected_log_prob", "#CC79A7", say("rejected")))),
    )
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    for axes, (title, stage, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        trained, held_out = curves[stage], curves[f"{stage}_held_out"]
        for column, measured, color, label in lines:
            axes.plot([row["step"] for row in trained], [row[column] for row in trained], color=color, lw=1, label=label or say("trained on"))
            axes.plot([row["step"] for row in held_out], [row[measured] for row in held_out], "o--", ms=4, lw=1, color=color, mfc="white", label=None if label else say("held out"))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(say("optimizer step"))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)
