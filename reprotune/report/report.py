"""The run of the stage `report`: the report as Markdown and as a page, its figures, and the model card."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from reprotune import params
from reprotune.records import write_text
from reprotune.report import figures, samples
from reprotune.report.document import Figure, Heading, Note, Part, html, markdown
from reprotune.report.drawing import use_font
from reprotune.report.metrics import Metrics, read, read_curve
from reprotune.report.model_card import card, card_header
from reprotune.report.sections import data, differences, results, setup, training
from reprotune.report.sections.limits import limits
from reprotune.report.translation import say, use

CURVES = ("sft", "sft_held_out", "dpo", "dpo_held_out")


def run(
    settings: params.Params, metrics: Path, evals: Path, plots: Path, page: Path, lock: Path, out: Path
) -> None:
    """Write everything into `out`, in the language of `report.language`.

    Args:
        page: folder of the page's template and of the translations.
        lock: the requirements file that pins the libraries.
    """
    use(settings.report.language, page)
    use_font(settings.report.language)
    numbers = read(settings, metrics)
    cells = samples.read(settings.evaluate.benchmarks, evals)
    chance = samples.chance(cells)
    draw(settings, numbers, chance, {name: read_curve(plots / f"{name}.csv") for name in CURVES}, out)
    parts = report(settings, numbers, chance, lock)
    write_text(out / "report.md", markdown(parts))
    write_text(out / "report.html", html(parts, page, out, samples.page(cells), settings.report.language))
    header = StringIO()
    YAML().dump(card_header(settings), header)
    write_text(out / "model_card.md", f"---\n{header.getvalue()}---\n\n{markdown(card(settings, numbers))}")


def draw(
    settings: params.Params,
    metrics: Metrics,
    chance: Mapping[str, float],
    curves: Mapping[str, list[dict[str, float]]],
    out: Path,
) -> None:
    rows = metrics.rows
    figures.training_pipeline(training.pipeline_steps(settings, metrics), out / "training_pipeline.svg")
    figures.comparison_bar(rows, chance, out / "comparison_bar.svg")
    figures.average_performance(rows, out / "average_performance.svg")
    figures.improvement_chart(rows, out / "improvement_chart.svg")
    figures.radar_chart(rows, chance, out / "radar_chart.svg")
    figures.training_curves(curves, out / "training_curves.svg")


def report(settings: params.Params, metrics: Metrics, chance: Mapping[str, float], lock: Path) -> list[Part]:
    return [
        Heading(settings.report.title, 1),
        *([Note(settings.report.note)] if settings.report.note else []),
        *results.in_short(metrics.rows),
        Figure("training_pipeline.svg", say("The stages of this run")),
        *results.results(metrics.rows, chance),
        *results.with_reported(metrics.rows, settings.report.reported),
        *differences.what_each_stage_gave(metrics),
        *differences.what_got_worse(metrics),
        *training.training(metrics),
        *data.data(metrics),
        *data.contamination(metrics),
        *training.cost(metrics),
        *limits(settings, metrics),
        *setup.setup(settings, lock),
        *setup.reproduce(),
    ]
