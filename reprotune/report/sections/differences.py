"""The sections on differences between models: what each stage gave, and what got worse."""

from collections.abc import Mapping
from typing import Any

from reprotune.comparison.scores import MEAN
from reprotune.comparison.significance import can_show, shown
from reprotune.comparison.table import Rows
from reprotune.comparison.wording import ALPHA_TEXT, LEVEL_TEXT, difference_text, p_text, percent
from reprotune.report.document import Figure, Heading, Part, Table, Text
from reprotune.report.metrics import Metrics
from reprotune.report.names import benchmark_name, comparison_names
from reprotune.report.translation import listed, say, sentences


def verdict(comparison: Mapping[str, float]) -> str:
    """A gain or a drop only where the test shows one."""
    if not shown(comparison):
        return say("no difference shown")
    return say("gain") if comparison["difference"] > 0 else say("drop")


def detectable_text(comparison: Mapping[str, float]) -> str:
    return f"{percent(comparison['detectable']):.1f}" if can_show(comparison) else say("none")


def what_each_stage_gave(metrics: Metrics) -> list[Part]:
    """The section "What each stage gave"."""
    return [
        Heading(say("What each stage gave")),
        Text(
            say(
                "Differences in percentage points on the same rows, with their {level} interval where any "
                "row differs; the intervals are not corrected for their number. A gain or drop is one that "
                "the test below shows at {alpha}, corrected for the number of tests.",
                level=LEVEL_TEXT,
                alpha=ALPHA_TEXT,
            )
        ),
        difference_table(metrics.rows),
        Text(shares_text(metrics)),
        Figure(
            "improvement_chart.svg",
            say(
                "Differences between the models, with {level} intervals; hollow where no difference is shown",
                level=LEVEL_TEXT,
            ),
        ),
        Text(
            say(
                "Rows that turned right or wrong; p of no difference, by McNemar's exact test where answers "
                "are right or wrong, and by random swaps of the two models' rows for fractions and for the "
                "mean; p as Holm corrects it for the number of tests; and the smallest true difference in "
                "points that this many rows would show in four cases of five, none where they are too few."
            )
        ),
        p_value_table(metrics.rows),
    ]


def difference_table(rows: Rows) -> Table:
    names = comparison_names()
    differences = [
        [
            benchmark_name(name),
            *(f"{difference_text(row[label])} ({verdict(row[label])})" for label in names),
        ]
        for name, row in rows.items()
    ]
    return Table([say("benchmark"), *names.values()], differences)


def p_value_table(rows: Rows) -> Table:
    tests = [
        [
            benchmark_name(name),
            comparison,
            f"{row[label]['better']:,}",
            f"{row[label]['worse']:,}",
            p_text(row[label]["p"]),
            p_text(row[label]["holm"]),
            detectable_text(row[label]),
        ]
        for name, row in rows.items()
        for label, comparison in comparison_names().items()
    ]
    header = [say("benchmark"), say("comparison"), say("better"), say("worse")]
    return Table([*header, "p", say("p, corrected"), say("detectable")], tests)


def shares_text(metrics: Metrics) -> str:
    """The shares of SFT and DPO in the gain of the mean score."""
    if not metrics.shares:
        return say("No gain in mean score is shown, so none is shared out between the stages.")
    return say(
        "Of the gain in mean score over the base model of {points} points, {shares}.",
        points=difference_text(metrics.rows[MEAN]["dpo_vs_base"]),
        shares=listed(
            [
                say(
                    "{stage} {share:.0f}% [{low:.0f}, {high:.0f}]",
                    stage=say(stage.upper()),
                    **{key: percent(number) for key, number in share.items()},
                )
                for stage, share in metrics.shares.items()
            ]
        ),
    )


def what_got_worse(metrics: Metrics) -> list[Part]:
    """The section "What got worse"."""
    rows = metrics.rows
    drops = [
        f"{benchmark_name(name)} ({comparison}): {difference_text(row[label])}"
        for name, row in rows.items()
        for label, comparison in comparison_names().items()
        if shown(row[label]) and row[label]["difference"] < 0
    ]
    turned_wrong = [
        f"{benchmark_name(name)} {row['dpo_vs_base']['worse']:,}"
        for name, row in rows.items()
        if name != MEAN and row["dpo_vs_base"]["worse"]
    ]
    text = [
        say("Drops that the test shows: {drops}.", drops="; ".join(drops))
        if drops
        else say("No drop of a score is shown."),
        say("Rows that the base model has right and SFT + DPO wrong: {turned}.", turned=listed(turned_wrong))
        if turned_wrong
        else say("On no row is SFT + DPO wrong where the base model is right."),
    ]
    if unlearned := worse_on_held_out(metrics):
        text.append(say("On held-out rows, without a test: {unlearned}.", unlearned="; ".join(unlearned)))
    return [Heading(say("What got worse")), Text(sentences(text))]


def worse_on_held_out(metrics: Metrics) -> list[str]:
    """The held-out measurements that training made worse."""
    return [
        say(
            "{stage} {measure}, {rows}: {before:.4f} → {after:.4f}",
            stage=say(stage.upper()),
            measure=say(row["measure"]),
            rows=say(row["rows"]),
            before=row["before"],
            after=row["after"],
        )
        for stage, record in metrics.train.items()
        for row in record["measured"]
        if row["rows"].startswith("held-out") and got_worse(row)
    ]


def got_worse(row: Mapping[str, Any]) -> bool:
    """Whether a loss rose, or another measurement fell; a rejected log-prob may do either."""
    if row["measure"] == "loss":
        return row["after"] > row["before"]
    return row["measure"] != "rejected log-prob" and row["after"] < row["before"]
