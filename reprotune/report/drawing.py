"""Colours, fonts, scores with intervals, and SVG files whose bytes repeat.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Letters are drawn as outlines, so that
they look the same everywhere, Chinese ones included.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reprotune.report.translation import say

BLUE, GRAY, GREEN, ORANGE, PURPLE, VERMILION = (
    "#0072B2",
    "#999999",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#D55E00",
)
MODEL_COLORS = {"base": GRAY, "sft": BLUE, "dpo": VERMILION}
COMPARISON_COLORS = {"sft_vs_base": BLUE, "dpo_vs_sft": ORANGE, "dpo_vs_base": VERMILION}
CHANCE: dict[str, Any] = {"color": "black", "lw": 1, "ls": (0, (4, 2))}
"""Style of the line for guessing."""

# independent of the user's own settings
matplotlib.rcdefaults()
matplotlib.use("Agg")
matplotlib.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "reprotune"}
)


def use_font(language: str) -> None:
    """Choose a font that has the language's letters. Noto Sans SC comes with the package zhplot."""
    matplotlib.rcParams["font.family"] = ["DejaVu Sans"]
    if language == "zh":
        # importing zhplot would change matplotlib's settings
        package = find_spec("zhplot")
        assert package is not None and package.origin is not None
        file = Path(package.origin).parent / "fonts" / "NotoSansSC-Regular.ttf"
        font_manager.fontManager.addfont(file)
        noto = font_manager.FontProperties(fname=file).get_name()
        matplotlib.rcParams["font.family"] = ["DejaVu Sans", noto]


def save(figure: Figure, path: Path) -> None:
    """Write an SVG file without a date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def with_interval(value: Mapping[str, float], key: str) -> tuple[float, list[list[float]]]:
    """A score or difference in percent, and the lengths of its interval below and above, (2, 1)."""
    center = 100 * value[key]
    # a quantile of resampled means can be just past the mean, and lengths must not be negative
    return center, [[abs(center - 100 * value["low"])], [abs(100 * value["high"] - center)]]


def score_bar(axes: Axes, x: float, width: float, model: str, score: Mapping[str, float]) -> None:
    """A bar in the model's colour, with the interval."""
    height, errors = with_interval(score, "score")
    axes.bar(x, height, width, yerr=errors, color=MODEL_COLORS[model], capsize=2, error_kw={"lw": 0.8})


def score_legend(axes: Axes, models: Mapping[str, str], chance: bool) -> None:
    for model, name in models.items():
        axes.bar(0, 0, 0, color=MODEL_COLORS[model], label=name)
    if chance:
        axes.plot([], [], label=say("chance"), **CHANCE)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
