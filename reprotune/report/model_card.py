"""The merged model's card, in the form that the Hub shows next to the weights."""

from typing import Any

from reprotune import params
from reprotune.comparison.wording import LEVEL_TEXT, score_text
from reprotune.report.document import Code, Heading, Note, Part, Table, Text
from reprotune.report.metrics import Metrics
from reprotune.report.names import benchmark_name, model_names
from reprotune.report.sections.differences import verdict, what_got_worse
from reprotune.report.sections.limits import limits
from reprotune.report.sections.setup import (
    benchmark_sources,
    hyperparameters,
    method,
    model_name,
    table_of,
    training_sources,
)
from reprotune.report.translation import say

USE = """from transformers import pipeline

chat = pipeline("text-generation", "models/final")
print(chat([{"role": "user", "content": "Name three colors."}])[0]["generated_text"][-1]["content"])"""
TRANSFORMERS = "4.57"
"""The oldest version of transformers whose logits and tokens were held against these files."""


def card(settings: params.Params, metrics: Metrics) -> list[Part]:
    base = model_name(settings.model.source)
    return [
        Heading(f"{base}-sft-dpo", 1),
        *([Note(settings.report.note)] if settings.report.note else []),
        Text(
            say(
                "{base}, fine-tuned on instructions (SFT) and on preferences (DPO) with {method}, and "
                "merged into one model in bfloat16.",
                base=base,
                method=method(settings.lora),
            )
        ),
        Code(USE),
        Text(
            say(
                "It needs transformers {version} or newer, or the version that brought its architecture. "
                "The chat template is plain Jinja.",
                version=TRANSFORMERS,
            )
        ),
        Heading(say("Trained on")),
        table_of(training_sources(settings)),
        Text(
            say(
                "SFT: {sft:,} rows; DPO: {dpo:,} pairs. Who uses the model is bound by the licences of all "
                "of them.",
                sft=metrics.data["sft"]["rows"],
                dpo=metrics.data["dpo"]["rows"],
            )
        ),
        hyperparameters(settings),
        *card_results(metrics),
        table_of(benchmark_sources(settings)),
        *what_got_worse(metrics),
        *limits(settings, metrics),
    ]


def card_results(metrics: Metrics) -> list[Part]:
    """The scores with verdicts, and how close the merged model is to the adapter."""
    merged = metrics.merged
    scores = [
        [
            benchmark_name(name),
            f"{row['n']:,}",
            *(score_text(row[model]) for model in model_names()),
            verdict(row["dpo_vs_base"]),
        ]
        for name, row in metrics.rows.items()
    ]
    return [
        Heading(say("Results")),
        Text(
            say(
                "In percent with {level} intervals; the last column says what a corrected test shows of SFT "
                "+ DPO against the base model.",
                level=LEVEL_TEXT,
            )
        ),
        Table([say("benchmark"), "n", *model_names().values(), say("shown")], scores),
        Text(
            say(
                "Merged model beside the adapter on the same base, on {n:,} held-out tokens: KL divergence "
                "{kl:.2g} nats a token, the same likeliest token at {agreement:.1f}%.",
                n=merged["n"],
                kl=merged["kl"],
                agreement=100 * merged["agreement"],
            )
        ),
    ]


def card_header(settings: params.Params) -> dict[str, Any]:
    """The metadata that the Hub reads. It knows only its own repositories, so other sources are left out."""
    data = settings.data
    datasets = [
        *(source.source for source in data.sft.sources.values()),
        *(source.source for source in data.preferences.sources.values()),
    ]
    repositories = {"base_model": hub_names([settings.model.source]), "datasets": hub_names(datasets)}
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "dpo", "trl"],
    } | {key: names for key, names in repositories.items() if names}


def hub_names(sources: list[params.Source]) -> list[str]:
    return [source.repo for source in sources if isinstance(source, params.HubSource)]
