"""The section on what the run does not show."""

from reprotune import params
from reprotune.comparison.significance import can_show
from reprotune.report.document import Heading, Part, Text
from reprotune.report.metrics import Metrics
from reprotune.report.names import benchmark_name
from reprotune.report.translation import listed, say, sentences


def limits(settings: params.Params, metrics: Metrics) -> list[Part]:
    """The section "Limits"."""
    text = [
        say(
            "This is one run with one seed ({seed}); how much another seed moves its numbers was not "
            "measured.",
            seed=settings.seed,
        ),
        *benchmark_limits(metrics),
    ]
    if settings.model.quantization != "none":
        text.append(
            say(
                "The scores are those of the adapters on a base in {quantization}. The merged model stands "
                "on the base's own weights and predicts otherwise: KL divergence {kl:.2g} nats a token, the "
                "same likeliest token at {agreement:.1f}%.",
                quantization=settings.model.quantization.upper(),
                kl=metrics.merged["scored_kl"],
                agreement=100 * metrics.merged["scored_agreement"],
            )
        )
    text.append(
        say(
            "The benchmarks test knowledge and reasoning in English; safety, honesty and other languages "
            "were not tested."
        )
    )
    return [Heading(say("Limits")), Text(sentences(text))]


def benchmark_limits(metrics: Metrics) -> list[str]:
    """Benchmarks that are scored in part, have too few rows to show anything, or are contaminated."""
    rows, counts = metrics.rows, metrics.data["contamination"]["benchmarks"]
    text = []
    in_part = [
        say(
            "{name} {n:,} of {rows:,}",
            name=benchmark_name(row["benchmark"]),
            n=rows[row["benchmark"]]["n"],
            rows=row["rows"],
        )
        for row in counts
        if rows[row["benchmark"]]["n"] < row["rows"]
    ]
    if in_part:
        text.append(say("Only a part of the rows is scored: {limited}.", limited=listed(in_part)))
    if blind := [benchmark_name(name) for name, row in rows.items() if not can_show(row["dpo_vs_base"])]:
        text.append(
            say("So few rows are scored that no difference could be shown on: {names}.", names=listed(blind))
        )
    if contaminated := [benchmark_name(row["benchmark"]) for row in counts if row["rows_contaminated"]]:
        text.append(
            say("Rows of these benchmarks are in the raw training data: {names}.", names=listed(contaminated))
        )
    return text
