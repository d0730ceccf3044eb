"""How scores, differences and p-values are written: in percent and percentage points."""

from collections.abc import Mapping

from reprotune.comparison.intervals import LEVEL
from reprotune.comparison.significance import ALPHA, can_show, shown

LEVEL_TEXT = f"{100 * LEVEL:.0f}%"
"""Of intervals."""
ALPHA_TEXT = f"{100 * ALPHA:.0f}%"
"""Of tests."""


def claim(comparison: Mapping[str, float]) -> str:
    """What a comparison shows, as the predicate of a sentence."""
    if shown(comparison):
        verb = "rose" if comparison["difference"] > 0 else "fell"
        return f"{verb} ({difference_and_p(comparison)})"
    least = (
        f"{percent(comparison['detectable']):.1f} points" if can_show(comparison) else "nothing, too few rows"
    )
    return f"shows no difference ({difference_and_p(comparison)}; what would have shown: {least})"


def difference_and_p(comparison: Mapping[str, float]) -> str:
    """The difference with its interval, and the corrected p."""
    return f"{difference_text(comparison)} p {p_text(comparison['holm'])}"


def difference_text(comparison: Mapping[str, float]) -> str:
    """The difference with its interval; without one where no row differs."""
    difference, low, high = (percent(comparison[key]) for key in ("difference", "low", "high"))
    interval = f" [{low:+.1f}, {high:+.1f}]" if comparison["better"] or comparison["worse"] else ""
    return f"{difference:+.1f}{interval}"


def score_text(score: Mapping[str, float]) -> str:
    """A score with its interval."""
    return f"{percent(score['score']):.1f} [{percent(score['low']):.1f}, {percent(score['high']):.1f}]"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def percent(share: float) -> float:
    # in binary floats 100 * 0.2875 is just below 28.75
    return round(100 * share, 6)
