"""The report's five figures, as PNG files without dates: same numbers, same bytes.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and a model has the same one everywhere.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

matplotlib.use("Agg")
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})

COLORS = {"base": "#999999", "sft": "#0072B2", "dpo": "#D55E00"}
LABELS = {"base": "base", "sft": "SFT", "dpo": "SFT + DPO"}
COMPARISONS = {"sft_vs_base": "SFT − base", "dpo_vs_sft": "DPO − SFT", "dpo_vs_base": "DPO − base"}
COMPARISON_COLORS = {"sft_vs_base": "#0072B2", "dpo_vs_sft": "#E69F00", "dpo_vs_base": "#D55E00"}
NAMES = {
    "arc_challenge": "ARC-Challenge",
    "commonsense_qa": "CommonsenseQA",
    "gsm8k": "GSM8K",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "mean": "mean",
}
Z = 1.96


def pretty(name: str) -> str:
    return NAMES.get(name, name)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


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


def comparison_bar(scores: dict[str, Any], path: Path) -> None:
    """Score of each model on each benchmark, in percent, with 95% intervals."""
    names = [name for name in scores if name != "mean"]
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(names))
    for offset, model in enumerate(COLORS):
        heights = [100 * scores[name][model]["score"] for name in names]
        errors = [100 * Z * scores[name][model]["stderr"] for name in names]
        axes.bar(places + (offset - 1) * 0.27, heights, 0.25, yerr=errors, color=COLORS[model], label=LABELS[model], capsize=2, error_kw={"lw": 0.8})
    axes.set_xticks(places, [pretty(name) for name in names])
    axes.set_ylim(0, 100)
    axes.set_ylabel("score, % (bars: 95% interval)")
    axes.legend(frameon=False, ncols=3, loc="upper left")
    save(figure, path)


def average_performance(scores: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(3.5, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for place, model in enumerate(COLORS):
        value, error = (100 * scores["mean"][model][key] for key in ("score", "stderr"))
        axes.bar(place, value, 0.6, yerr=Z * error, color=COLORS[model], capsize=3, error_kw={"lw": 0.8})
        axes.text(place, 2, f"{round(value, 6):.1f}", ha="center", color="white", fontweight="bold")
    axes.set_xticks(range(len(COLORS)), LABELS.values())
    axes.set_ylim(0, 100)
    axes.set_ylabel("mean score, % (bars: 95% interval)")
    save(figure, path)


def improvement_chart(differences: dict[str, Any], path: Path) -> None:
    """Paired differences in points with 95% intervals; an interval that covers zero shows no difference."""
    names = list(differences)[::-1]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(names))
    for offset, label in enumerate(COMPARISONS):
        values = [100 * differences[name][label]["difference"] for name in names]
        errors = [100 * Z * differences[name][label]["stderr"] for name in names]
        axes.errorbar(values, places + (1 - offset) * 0.22, xerr=errors, fmt="o", ms=4, lw=1, capsize=2, color=COMPARISON_COLORS[label], label=COMPARISONS[label])
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(places, [pretty(name) for name in names])
    axes.set_xlabel("difference, percentage points (bars: 95% interval, paired)")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, path)


def radar_chart(scores: dict[str, Any], path: Path) -> None:
    names = [name for name in scores if name != "mean"]
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    # the widest below, so that models with equal scores are all seen
    for width, model in zip((5, 3, 1.2), COLORS, strict=True):
        values = [100 * scores[name][model]["score"] for name in names]
        axes.plot(np.append(angles, angles[0]), [*values, values[0]], color=COLORS[model], lw=width, label=LABELS[model])
    axes.set_xticks(angles, [pretty(name) for name in names])
    axes.tick_params(axis="x", pad=4)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = np.cos(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.5 else "left" if side > 0 else "right")
    axes.set_ylim(0, 100)
    axes.set_rlabel_position(90 / len(names))
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    save(figure, path)
