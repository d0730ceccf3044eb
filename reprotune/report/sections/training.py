"""The sections on training: the stages of the run, what training measured, and what it cost."""

from typing import Any

from reprotune import params
from reprotune.comparison.scores import MEAN, MODELS
from reprotune.report.document import Figure, Heading, Note, Part, Table, Text
from reprotune.report.metrics import Metrics
from reprotune.report.sections.setup import method, model_name
from reprotune.report.translation import say

COLLAPSE = 1.2
"""DPO that multiplies the chosen log-prob by more than this collapsed: it unlearns what it should prefer."""


def pipeline_steps(settings: params.Params, metrics: Metrics) -> list[tuple[str, str]]:
    """Each stage and what it did, for the figure."""
    data, train = metrics.data, metrics.train
    base = f"{model_name(settings.model.source)}\n{settings.model.quantization}, {settings.model.dtype}"
    sft = say(
        "{rows:,} examples\n{steps:,} steps, {method}",
        rows=data["sft"]["rows"],
        steps=train["sft"]["steps"],
        method=method(settings.lora),
    )
    dpo = say(
        "{rows:,} pairs\n{steps:,} steps, β {beta:g}",
        rows=data["dpo"]["rows"],
        steps=train["dpo"]["steps"],
        beta=settings.dpo.beta,
    )
    evaluate = say(
        "{models} models ×\n{count} benchmarks", models=len(MODELS), count=len(settings.evaluate.benchmarks)
    )
    return [
        (say("base"), base),
        (say("SFT"), sft),
        (say("reference"), say("log-probs of the\nSFT model, once")),
        (say("DPO"), dpo),
        (say("evaluate"), evaluate),
    ]


def training(metrics: Metrics) -> list[Part]:
    """The section "Training"."""
    measured = [
        [
            f"{say(stage.upper())} {say(row['measure'])}, {say(row['rows'])}",
            f"{row['before']:.4f}",
            f"{row['after']:.4f}",
            f"{row['n']:,} {say(row['unit'])}",
        ]
        for stage, record in metrics.train.items()
        for row in record["measured"]
    ]
    return [
        Heading(say("Training")),
        Text(
            say(
                "Losses in nats: SFT's a token, DPO's a pair. Before its first step DPO's policy is its "
                "reference, up to rounding: margins of 0, and ties, which count half."
            )
        ),
        Table([say("measure"), say("before"), say("after"), "n"], measured),
        Figure(
            "training_curves.svg",
            say("Training curves: SFT loss, DPO loss, reward margin and log-probs by step"),
        ),
        *collapse_warnings(metrics.train["dpo"]["measured"]),
    ]


def collapse_warnings(measured: list[dict[str, Any]]) -> list[Note]:
    """A warning for each part of the pairs on which DPO collapsed, as it can while the margin grows."""
    measurements = {(row["rows"], row["measure"]): row for row in measured}
    notes = []
    for (rows, measure), chosen in measurements.items():
        if measure != "chosen log-prob" or chosen["after"] >= COLLAPSE * chosen["before"]:
            continue
        text = say(
            "**Warning**: the log-prob of the chosen answers of {rows} fell from {before:.1f} to "
            "{after:.1f} nats.",
            rows=say(rows),
            before=chosen["before"],
            after=chosen["after"],
        )
        rejected = measurements.get((rows, "rejected log-prob"))
        if rejected and rejected["after"] < rejected["before"]:
            text += " " + say(
                "That of the rejected ones fell from {before:.1f} to {after:.1f}: both are unlearned.",
                before=rejected["before"],
                after=rejected["after"],
            )
        text += " " + say("A larger beta, a lower learning rate or fewer steps hold it back.")
        notes.append(Note(text))
    return notes


def cost(metrics: Metrics) -> list[Part]:
    """The section "Cost"."""
    trained = [
        say(
            "{stage} trained {steps:,} steps on {tokens:,} tokens",
            stage=say(stage.upper()),
            steps=record["steps"],
            tokens=record["tokens"],
        )
        for stage, record in metrics.train.items()
    ]
    return [
        Heading(say("Cost")),
        Text(
            say(
                "{trained}; {scored:,} rows were scored by each of {models} models.",
                trained="; ".join(trained),
                scored=metrics.rows[MEAN]["n"],
                models=len(MODELS),
            )
        ),
        Text(
            say(
                "Devices, seconds, tokens a second and memory differ from run to run. "
                "They are measured, not versioned: see `measured/`. Energy was not measured."
            )
        ),
    ]
