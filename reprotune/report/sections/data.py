"""The sections on data: what became of the raw rows, and contamination."""

from reprotune.comparison.wording import score_text
from reprotune.report.document import Heading, Part, Table, Text
from reprotune.report.metrics import Metrics
from reprotune.report.names import benchmark_name, model_names
from reprotune.report.translation import listed, say


def data(metrics: Metrics) -> list[Part]:
    """The section "Data"."""
    columns = {
        "raw": say("raw"),
        "over_limit": say("not taken"),
        "invalid": say("invalid"),
        "no_preference": say("no preference"),
        "overlong": say("too long"),
        "without_labels": say("no label"),
        "contaminated": say("contaminated"),
        "duplicate": say("duplicate"),
        "near_duplicate": say("near-duplicate"),
        "not_drawn": say("not drawn"),
        "held_out": say("held out"),
        "train": say("trained on"),
    }
    rows = [
        [
            f"{say(stage.upper())}: {counts['source']}",
            *(f"{counts['rows'][key]:,}" for key in columns),
            f"{counts['tokens']['train']:,}",
        ]
        for stage in ("sft", "dpo")
        for counts in metrics.data[stage]["sources"]
    ]
    (shards,) = (shards for shards in metrics.data["sft"]["shards"] if shards["part"] == "train")
    return [
        Heading(say("Data")),
        Text(say("What became of each raw row; the columns after the first add up to it.")),
        Table([say("source"), *columns.values(), say("tokens, with prompts")], rows),
        Text(
            say(
                "SFT trains on {rows:,} rows of which tokens fill {filled:.1f}%.",
                rows=shards["rows"],
                filled=100 * shards["filled"],
            )
        ),
    ]


def contamination(metrics: Metrics) -> list[Part]:
    """The section "Contamination"."""
    without_clean = [benchmark_name(name) for name in metrics.rows if name not in metrics.clean]
    training = [
        say(
            "{source} {contaminated:,} of {rows:,}",
            source=row["source"],
            contaminated=row["rows_contaminated"],
            rows=row["rows"],
        )
        for row in metrics.data["contamination"]["training"]
    ]
    parts: list[Part] = [
        Heading(say("Contamination")),
        Text(
            say(
                "Benchmark rows that share 13 words in a row with a raw training row, or at least the set "
                "share of their 8-grams; rows of fewer than 8 words are too short to judge, and count as "
                "clean. The scores are those on the scored rows that are clean, where those are two or more.",
            )
        ),
        contamination_table(metrics),
    ]
    if without_clean:
        names = listed(without_clean)
        parts.append(Text(say("Without clean scores, and left out of their mean: {names}.", names=names)))
    parts.append(
        Text(say("Raw training rows that hold a benchmark row: {trained}.", trained="; ".join(training)))
    )
    return parts


def contamination_table(metrics: Metrics) -> Table:
    counts = {
        row["benchmark"]: [f"{row[key]:,}" for key in ("rows", "rows_contaminated", "rows_too_short")]
        for row in metrics.data["contamination"]["benchmarks"]
    }
    rows = []
    for name in metrics.rows:
        scores = [""] * (1 + len(model_names()))
        if row := metrics.clean.get(name):
            scores = [f"{row['n']:,}", *(score_text(row[model]) for model in model_names())]
        rows.append([benchmark_name(name), *counts.get(name, [""] * 3), *scores])
    header = [say("benchmark"), say("rows"), say("contaminated"), say("too short"), say("n, clean")]
    return Table([*header, *model_names().values()], rows)
