"""Write `report/report.md` and its figures from the run's own files.

Every number comes from a metrics file, and a difference is called a gain or a loss only where its 95% interval leaves
zero out.
"""

import argparse
from pathlib import Path
from typing import Any

from stages import command, figures, params
from stages.figures import COMPARISONS, LABELS, Z, pretty
from stages.records import read_json, write_text


def run(settings: params.Params, metrics: Path, out: Path) -> None:
    summary = read_json(metrics / "summary.json")
    scores, differences = ({row["benchmark"]: row[key] for row in summary["all"]} for key in ("scores", "differences"))
    data = {name: read_json(metrics / "data" / f"{name}.json") for name in ("sft", "dpo", "contamination")}
    train = {name: read_json(metrics / "train" / f"{name}.json") for name in ("sft", "dpo")}
    figures.training_pipeline(pipeline_steps(settings, data, train), out / "training_pipeline.png")
    figures.comparison_bar(scores, out / "comparison_bar.png")
    figures.average_performance(scores, out / "average_performance.png")
    figures.improvement_chart(differences, out / "improvement_chart.png")
    figures.radar_chart(scores, out / "radar_chart.png")
    sections = [
        f"# {settings.report.title}",
        *([f"> {settings.report.note}"] if settings.report.note else []),
        "![The pipeline](training_pipeline.png)",
        results(summary),
        what_each_stage_brought(summary),
        training(train),
        data_section(data),
        contamination(data["contamination"], summary),
        setup(settings),
        reproduce(),
    ]
    write_text(out / "report.md", "\n\n".join(sections) + "\n")


def pipeline_steps(settings: params.Params, data: dict, train: dict) -> list[tuple[str, str]]:
    return [
        ("base", f"{model_name(settings.model.source)}\n{settings.model.quantization}, {settings.model.dtype}"),
        ("SFT", f"{data['sft']['rows']:,} examples\n{train['sft']['steps']:,} steps, {method(settings.lora)}"),
        ("reference", "log-probs of the\nSFT model, once"),
        ("DPO", f"{data['dpo']['rows']:,} pairs\n{train['dpo']['steps']:,} steps, β {settings.dpo.beta:g}"),
        ("evaluate", f"3 models ×\n{len(settings.evaluate.benchmarks)} benchmarks"),
    ]


def method(lora: params.Lora) -> str:
    return "all weights" if lora.method == "full" else f"{'LoRA' if lora.method == 'lora' else 'DoRA'} r {lora.r}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(value: dict[str, float], key: str) -> str:
    sign = "+" if key == "difference" else ""
    # 0.2875 is 28.75 percent, which binary floats make a little less
    return f"{round(100 * value[key], 6):{sign}.1f} ± {round(100 * Z * value['stderr'], 6):.1f}"


def results(summary: dict[str, Any]) -> str:
    rows = [[pretty(row["benchmark"]), f"{row['n']:,}", *(percent(row["scores"][model], "score") for model in LABELS)] for row in summary["all"]]
    return "\n\n".join(
        [
            "## Results",
            "Score in percent ± half the width of its 95% interval; n is the number of rows scored.",
            table(["benchmark", "n", *LABELS.values()], rows),
            "![Scores](comparison_bar.png)",
            "![Mean score](average_performance.png)",
            "![Profile](radar_chart.png)",
        ]
    )


def verdict(value: dict[str, float]) -> str:
    if abs(value["difference"]) <= Z * value["stderr"] or value["difference"] == 0:
        return "no difference shown"
    return "gain" if value["difference"] > 0 else "loss"


def what_each_stage_brought(summary: dict[str, Any]) -> str:
    rows = [
        [pretty(row["benchmark"]), *(f"{percent(value, 'difference')} ({verdict(value)})" for value in (row["differences"][label] for label in COMPARISONS))]
        for row in summary["all"]
    ]
    shares = " and ".join(f"{item['stage'].upper()} {100 * item['share']:.0f}%" for item in summary["share_of_gain"])
    mean = summary["all"][-1]["differences"]["dpo_vs_base"]
    text = "The mean score did not rise, so there is no gain to share out between the stages."
    if shares:
        text = f"Of the rise in mean score of {100 * mean['difference']:.1f} points, {shares}."
        if verdict(mean) != "gain":
            text += " The interval of that rise covers zero: these shares describe the sample, not the models."
    return "\n\n".join(
        [
            "## What each stage brought",
            "Differences in percentage points on the same rows, ± half the width of the paired 95% interval.",
            table(["benchmark", *COMPARISONS.values()], rows),
            text,
            "![Differences](improvement_chart.png)",
        ]
    )


def training(train: dict[str, dict[str, Any]]) -> str:
    rows = [
        [f"{stage.upper()} {row['measure']}, {row['rows']}", f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['n']:,} {row['unit']}"]
        for stage, record in train.items()
        for row in record["measured"]
    ]
    ran = ", ".join(f"{stage.upper()} ran {record['steps']:,} steps over {record['tokens']:,} tokens" for stage, record in train.items())
    return "\n\n".join(
        [
            "## Training",
            "Losses in nats: SFT's a token, DPO's a pair. Before its first step DPO's policy is its reference, up to rounding: margins of 0, and ties, which count half.",
            table(["measure", "before", "after", "n"], rows),
            f"{ran}.",
            *collapsed(train["dpo"]),
        ]
    )


COLLAPSE = 1.2
"""A mean log-prob of the chosen answers that DPO multiplies by more than this has collapsed: the model unlearns what it should prefer."""


def collapsed(record: dict[str, Any]) -> list[str]:
    """A warning for each part of the pairs where DPO made the chosen answers much less likely, as it can while the margin grows."""
    return [
        f"> **Warning**: the log-prob of the chosen answers of {row['rows']} fell from {row['before']:.1f} to {row['after']:.1f} nats: DPO widens its margin by "
        "making both answers unlikely. A larger beta, a lower learning rate or fewer steps hold it back."
        for row in record["measured"]
        if row["measure"] == "chosen log-prob" and row["after"] < COLLAPSE * row["before"]
    ]


def data_section(data: dict[str, dict]) -> str:
    names = {
        "raw": "raw", "over_limit": "not taken", "invalid": "invalid", "no_preference": "no preference", "overlong": "too long",
        "without_labels": "no label", "contaminated": "contaminated", "duplicate": "duplicate", "near_duplicate": "near-duplicate",
        "not_drawn": "not drawn", "held_out": "held out", "train": "trained on",
    }  # fmt: skip
    rows = [
        [f"{stage.upper()}: {counts['source']}", *(f"{counts['rows'][key]:,}" for key in names), f"{counts['tokens']['train']:,}"]
        for stage in ("sft", "dpo")
        for counts in data[stage]["sources"]
    ]
    (filled,) = (shards for shards in data["sft"]["shards"] if shards["part"] == "train")
    return "\n\n".join(
        [
            "## Data",
            "What became of each raw row; the columns after the first add up to it.",
            table(["source", *names.values(), "tokens trained on"], rows),
            f"SFT trains on {filled['rows']:,} rows of which tokens fill {100 * filled['filled']:.1f}%.",
        ]
    )


def contamination(found: dict[str, Any], summary: dict[str, Any]) -> str:
    counts = {row["benchmark"]: [f"{row[key]:,}" for key in ("rows", "rows_contaminated", "rows_too_short")] for row in found["benchmarks"]}
    rows = []
    for row in summary["clean"]:
        scores = [percent(row["scores"][model], "score") if row["scores"] else "" for model in LABELS]
        rows.append([pretty(row["benchmark"]), *counts.get(row["benchmark"], [""] * 3), f"{row['n']:,}", *scores])
    trained = [f"{row['source']} {row['rows_contaminated']:,} of {row['rows']:,}" for row in found["training"]]
    return "\n\n".join(
        [
            "## Contamination",
            "Benchmark rows that share 13 words in a row with a raw training row, or that its 8-grams cover to the set part; rows of fewer than "
            "8 words cannot be judged. The scores are those on the scored rows that are clean, where those are two or more.",
            table(["benchmark", "rows", "contaminated", "too short", "n, clean", *LABELS.values()], rows),
            f"Raw training rows that hold a benchmark row: {'; '.join(trained)}.",
        ]
    )


def model_name(source: params.Source) -> str:
    """The repository's or the file's own name."""
    return source.repo.split("/")[-1] if isinstance(source, params.HubSource) else Path(source.path).name.split(".")[0]


def source_text(source: params.Source) -> str:
    if isinstance(source, params.HubSource):
        return f"Hub `{source.repo}` at `{source.revision}`"
    if isinstance(source, params.PypiSource):
        return f"PyPI `{source.package}=={source.version}`, `{source.path}`"
    return f"local `{source.path}`"


def setup(settings: params.Params) -> str:
    sources = [["base model", source_text(settings.model.source)]]
    for label, data in (("SFT", settings.data.sft), ("preferences", settings.data.preferences)):
        sources += [[f"{label}: {name}", source_text(item.source)] for name, item in sorted(data.sources.items())]
    sources += [[pretty(name), source_text(settings.benchmarks[name].source)] for name in settings.evaluate.benchmarks]
    shots = ", ".join(f"{pretty(name)} {settings.benchmarks[name].num_fewshot}" for name in settings.evaluate.benchmarks)
    values = [
        [section, ", ".join(f"{key} {value}" for key, value in getattr(settings, section).model_dump().items())] for section in ("lora", "sft", "dpo")
    ]
    return "\n\n".join(
        [
            "## Setup",
            table(["what", "source"], sources),
            table(["section", "values"], [*values, ["evaluate", f"examples in the prompt: {shots}"], ["seed", str(settings.seed)]]),
        ]
    )


def reproduce() -> str:
    return "\n\n".join(["## Reproduce", "```\nmake repro\n```", "`dvc.lock` names every input and output of this run by its hash."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run(params.load(), arguments.metrics, arguments.out)


if __name__ == "__main__":
    command(main)
