"""Write `report/report.md`, `report/report.html`, their figures and `report/model_card.md` from the run's own files, in the language of `report.language`.

The HTML is one file that works offline, and has samples of all models side by side; the card goes beside `models/final` when that is published.
"""

import argparse
import csv
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from stages import InputError, command, figures, language, params, samples, sections
from stages.document import Figure, Heading, Note, html, markdown
from stages.language import say
from stages.records import read_json, write_text


def run(settings: params.Params, metrics: Path, evals: Path, plots: Path, page: Path, out: Path) -> None:
    language.use(settings.report.language, page)
    figures.use_font(settings.report.language)
    summary = read_json(metrics / "summary.json")
    summary["all"] = rows = {name: summary["all"][name] for name in [*settings.evaluate.benchmarks, "mean"]}
    data = {name: read_json(metrics / "data" / f"{name}.json") for name in ("sft", "dpo", "contamination")}
    train = {name: read_json(metrics / "train" / f"{name}.json") for name in ("sft", "dpo")}
    merged = read_json(metrics / "merge.json")
    found = samples.read(settings.evaluate.benchmarks, evals)
    chance = samples.chance(found)
    figures.training_pipeline(sections.pipeline_steps(settings, data, train), out / "training_pipeline.svg")
    figures.comparison_bar(rows, chance, out / "comparison_bar.svg")
    figures.average_performance(rows, out / "average_performance.svg")
    figures.improvement_chart(rows, out / "improvement_chart.svg")
    figures.radar_chart(rows, chance, out / "radar_chart.svg")
    figures.training_curves({name: read_curve(plots / f"{name}.csv") for name in ("sft", "sft_held_out", "dpo", "dpo_held_out")}, out / "training_curves.svg")
    parts = [
        Heading(settings.report.title, 1),
        *([Note(settings.report.note)] if settings.report.note else []),
        *sections.in_short(rows),
        Figure("training_pipeline.svg", say("The stages of this run")),
        *sections.results(rows, chance),
        *sections.with_reported(rows, settings.report.reported),
        *sections.what_each_stage_gave(summary),
        *sections.what_got_worse(rows, train),
        *sections.training(train),
        *sections.data_section(data),
        *sections.contamination(data["contamination"], summary),
        *sections.cost(train, rows),
        *sections.limits(settings, summary, data, merged),
        *sections.setup(settings, train),
        *sections.reproduce(),
    ]
    write_text(out / "report.md", markdown(parts))
    write_text(out / "report.html", html(parts, page, out, samples.page(found), settings.report.language))
    header = StringIO()
    YAML().dump(sections.card_header(settings), header)
    write_text(out / "model_card.md", f"---\n{header.getvalue()}---\n\n{markdown(sections.card(settings, summary, data, train, merged))}")


def read_curve(file: Path) -> list[dict[str, float]]:
    with file.open(encoding="utf-8", newline="") as opened:
        try:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(opened)]
        except (TypeError, ValueError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not a table of numbers ({error}); `dvc repro` makes it anew") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("metrics", "evals", "plots", "page", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    run(params.load(), **vars(parser.parse_args()))


if __name__ == "__main__":
    command(main)
