"""The sections on scores: in short, results, and published scores next to this run's."""

from collections.abc import Mapping

from reprotune import params
from reprotune.comparison.scores import MEAN
from reprotune.comparison.significance import can_show, shown
from reprotune.comparison.table import Rows
from reprotune.comparison.wording import LEVEL_TEXT, difference_text, percent, score_text
from reprotune.report.document import Figure, Heading, Part, Table, Text
from reprotune.report.names import benchmark_name, model_names
from reprotune.report.sections.differences import detectable_text, verdict
from reprotune.report.translation import listed, say, sentences


def in_short(rows: Rows) -> list[Part]:
    """The section "In short": what the tests support, in words."""
    benchmarks = [name for name in rows if name != MEAN]
    text = [
        say(
            "In the mean over {count} benchmarks SFT + DPO scores {dpo}%, SFT {sft}% and the base model "
            "{base}%.",
            count=len(benchmarks),
            **{model: score_text(rows[MEAN][model]) for model in model_names()},
        ),
        gain_text(rows[MEAN]["dpo_vs_base"]),
    ]
    by_verdict = {
        word: [benchmark_name(name) for name in benchmarks if verdict(rows[name]["dpo_vs_base"]) == word]
        for word in (say("gain"), say("drop"))
    }
    text += [
        say("Benchmarks with a {word}: {names}.", word=word, names=listed(names))
        for word, names in by_verdict.items()
        if names
    ]
    if not any(by_verdict.values()):
        text.append(say("On no benchmark is a gain or a drop shown."))
    return [Heading(say("In short")), Text(sentences(text))]


def gain_text(gain: Mapping[str, float]) -> str:
    """Whether the mean score of DPO differs from that of the base model, and if not, what could have shown.

    Args:
        gain: the comparison of the two.
    """
    points = difference_text(gain)
    if shown(gain):
        if gain["difference"] > 0:
            return say("That is a gain over the base model of {points} points.", points=points)
        return say("That is a drop from the base model of {points} points.", points=points)
    if can_show(gain):
        least = say(
            "With this many rows, a true difference of {detectable} points would be shown in four cases "
            "of five.",
            detectable=detectable_text(gain),
        )
    else:
        least = say("With so few rows, no difference could be shown.")
    return f"{say('No difference from the base model is shown: {points} points.', points=points)} {least}"


def results(rows: Rows, chance: Mapping[str, float]) -> list[Part]:
    """The section "Results".

    Args:
        chance: the score of guessing, by benchmark.
    """
    scores = [
        [
            benchmark_name(name),
            f"{row['n']:,}",
            f"{percent(chance[name]):.1f}" if name in chance else "",
            *(score_text(row[model]) for model in model_names()),
        ]
        for name, row in rows.items()
    ]
    return [
        Heading(say("Results")),
        Text(
            say(
                "Score in percent with its {level} interval; n is the number of rows scored, chance what "
                "guessing among the choices gives.",
                level=LEVEL_TEXT,
            )
        ),
        Table([say("benchmark"), "n", say("chance"), *model_names().values()], scores),
        Figure(
            "comparison_bar.svg",
            say("Score of each model on each benchmark, with {level} intervals", level=LEVEL_TEXT),
        ),
        Figure(
            "average_performance.svg",
            say("Mean score of each model, with {level} intervals", level=LEVEL_TEXT),
        ),
        Figure("radar_chart.svg", say("Scores of the models on all benchmarks as a profile")),
    ]


def with_reported(rows: Rows, reported: params.Reported | None) -> list[Part]:
    """The section "Beside reported numbers"; empty if there are none."""
    if reported is None:
        return []
    table = [
        reported_row(name, label, rows[name][model], getattr(published, model))
        for name, published in reported.scores.items()
        for model, label in model_names().items()
        if name in rows
    ]
    header = [say("benchmark"), say("model"), say("this run"), say("reported")]
    return [
        Heading(say("Beside reported numbers")),
        Text(
            say(
                "Reported by: {source}. The interval is that of this run's score alone; the reported one "
                "has its own, which is not known.",
                source=reported.source,
            )
        ),
        Table([*header, say("difference"), say("within the interval")], table),
    ]


def reported_row(benchmark: str, model: str, score: Mapping[str, float], published: float) -> list[str]:
    """A published score, in percent, and whether it lies within the interval of this run's."""
    within = 100 * score["low"] <= published <= 100 * score["high"]
    return [
        benchmark_name(benchmark),
        model,
        score_text(score),
        f"{published:.2f}",
        f"{percent(score['score']) - published:+.1f}",
        say("yes") if within else say("no"),
    ]
