"""The sections of the report and of the model card. Every number comes from the run's own files, and a difference is called a gain or a drop only where a test shows it."""

import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages import params
from stages.document import Code, Figure, Heading, Note, Part, Table, Text
from stages.figures import comparisons, labels, pretty
from stages.language import listed, say
from stages.statistics import LEVEL, p_text, percent, percents, points, shown

Record = dict[str, Any]
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "deepspeed", "datasets", "lm_eval", "dvc")
COLLAPSE = 1.2
"""A mean log-prob of the chosen answers that DPO multiplies by more than this has collapsed: the model unlearns what it should prefer."""


def pipeline_steps(settings: params.Params, data: Record, train: Record) -> list[tuple[str, str]]:
    return [
        (say("base"), f"{model_name(settings.model.source)}\n{settings.model.quantization}, {settings.model.dtype}"),
        (say("SFT"), say("{rows:,} examples\n{steps:,} steps, {method}", rows=data["sft"]["rows"], steps=train["sft"]["steps"], method=method(settings.lora))),
        (say("reference"), say("log-probs of the\nSFT model, once")),
        (say("DPO"), say("{rows:,} pairs\n{steps:,} steps, β {beta:g}", rows=data["dpo"]["rows"], steps=train["dpo"]["steps"], beta=settings.dpo.beta)),
        (say("evaluate"), say("3 models ×\n{count} benchmarks", count=len(settings.evaluate.benchmarks))),
    ]


def method(lora: params.Lora) -> str:
    return say("all weights") if lora.method == "full" else f"{'LoRA' if lora.method == 'lora' else 'DoRA'} r {lora.r}"


def verdict(value: Mapping[str, float]) -> str:
    if not shown(value):
        return say("no difference shown")
    return say("gain") if value["difference"] > 0 else say("drop")


def detectable(value: Mapping[str, float]) -> str:
    return f"{percent(value['detectable']):.1f}" if value["detectable"] <= 1 else say("none")


def in_short(rows: Record) -> list[Part]:
    """What the run showed, in words that its tests support."""
    mean, names = rows["mean"], [name for name in rows if name != "mean"]
    scores = {model: percents(mean[model]) for model in labels()}
    text = [say("In the mean over {count} benchmarks SFT + DPO scores {dpo}%, SFT {sft}% and the base model {base}%.", count=len(names), **scores)]
    whole = mean["dpo_vs_base"]
    if not shown(whole):
        text.append(
            say("No difference from the base model is shown: {points} points.", points=points(whole)) + " "
            + (say("As many rows would show one of {detectable} points in four of five cases.", detectable=detectable(whole)) if whole["detectable"] <= 1 else say("So few rows can show none at all."))
        )
    elif whole["difference"] > 0:
        text.append(say("That is a gain over the base model of {points} points.", points=points(whole)))
    else:
        text.append(say("That is a drop from the base model of {points} points.", points=points(whole)))
    by = {word: [pretty(name) for name in names if verdict(rows[name]["dpo_vs_base"]) == word] for word in (say("gain"), say("drop"))}
    text += [f"{say('Benchmarks with a {word}: {names}.', word=word, names=listed(found))}" for word, found in by.items() if found]
    if not any(by.values()):
        text.append(say("On no benchmark is a gain or a drop shown."))
    return [Heading(say("In short")), Text(say(" ").join(text))]


def results(rows: Record, chance: Mapping[str, float]) -> list[Part]:
    table = [
        [pretty(name), f"{row['n']:,}", f"{percent(chance[name]):.1f}" if name in chance else "", *(percents(row[model]) for model in labels())] for name, row in rows.items()
    ]
    return [
        Heading(say("Results")),
        Text(say("Score in percent with its 95% interval; n is the number of rows scored, chance what guessing among the choices gives.")),
        Table([say("benchmark"), "n", say("chance"), *labels().values()], table),
        Figure("comparison_bar.svg", say("Score of each model on each benchmark, with 95% intervals")),
        Figure("average_performance.svg", say("Mean score of each model, with 95% intervals")),
        Figure("radar_chart.svg", say("Scores of the models on all benchmarks as a profile")),
    ]


def with_reported(rows: Record, reported: params.Reported | None) -> list[Part]:
    """Published scores beside this run's, and whether they lie within its intervals."""
    if reported is None:
        return []
    table = []
    for name, published in reported.scores.items():
        for model, label in labels().items():
            if name in rows:
                own, theirs = rows[name][model], getattr(published, model)
                within = say("yes") if 100 * own["low"] <= theirs <= 100 * own["high"] else say("no")
                table.append([pretty(name), label, percents(own), f"{theirs:.2f}", f"{percent(own['score']) - theirs:+.1f}", within])
    return [
        Heading(say("Beside reported numbers")),
        Text(say("Reported by: {source}. The interval is that of this run's score alone; the reported one has its own, which is not known.", source=reported.source)),
        Table([say("benchmark"), say("model"), say("this run"), say("reported"), say("difference"), say("within the interval")], table),
    ]


def what_each_stage_gave(summary: Record) -> list[Part]:
    rows = summary["all"]
    table = [[pretty(name), *(f"{points(row[label])} ({verdict(row[label])})" for label in comparisons())] for name, row in rows.items()]
    tests = [
        [pretty(name), text, f"{row[label]['better']:,}", f"{row[label]['worse']:,}", p_text(row[label]["p"]), p_text(row[label]["holm"]), detectable(row[label])]
        for name, row in rows.items()
        for label, text in comparisons().items()
    ]
    shares = [
        say("{stage} {share:.0f}% [{low:.0f}, {high:.0f}]", stage=say(stage.upper()), **{key: percent(number) for key, number in value.items()})
        for stage, value in summary.get("share_of_gain", {}).items()
    ]
    text = say("No gain in mean score is shown, so none is shared out between the stages.")
    if shares:
        text = say("Of the gain in mean score over the base model of {points} points, {shares}.", points=points(rows["mean"]["dpo_vs_base"]), shares=listed(shares))
    return [
        Heading(say("What each stage gave")),
        Text(
            say(
                "Differences in percentage points on the same rows, with their 95% interval where any row differs; intervals are each for itself. A gain or drop is one that the "
                "test below shows at {level:.0f}%, corrected for the number of tests.",
                level=100 * (1 - LEVEL),
            )
        ),
        Table([say("benchmark"), *comparisons().values()], table),
        Text(text),
        Figure("improvement_chart.svg", say("Differences between the models, with 95% intervals; hollow where no difference is shown")),
        Text(
            say(
                "Rows that turned right or wrong; p of no difference, by McNemar's exact test where answers are right or wrong, and by random swaps of the two models' rows for "
                "fractions and for the mean; the same as Holm corrects it; and the smallest true difference in points that as many rows would show in four of five cases."
            )
        ),
        Table([say("benchmark"), say("comparison"), say("better"), say("worse"), "p", say("p, corrected"), say("detectable")], tests),
    ]


def what_got_worse(rows: Record, train: Record) -> list[Part]:
    drops = [f"{pretty(name)} ({text}): {points(row[label])}" for name, row in rows.items() for label, text in comparisons().items() if shown(row[label]) and row[label]["difference"] < 0]
    turned = [f"{pretty(name)} {row['dpo_vs_base']['worse']:,}" for name, row in rows.items() if name != "mean" and row["dpo_vs_base"]["worse"]]
    unlearned = [
        say("{stage} {measure}, {rows}: {before:.4f} → {after:.4f}", stage=say(stage.upper()), measure=say(row["measure"]), rows=say(row["rows"]), before=row["before"], after=row["after"])
        for stage, record in train.items()
        for row in record["measured"]
        if row["rows"].startswith("held-out") and (row["after"] > row["before"] if row["measure"] == "loss" else row["after"] < row["before"]) and row["measure"] != "rejected log-prob"
    ]
    text = [say("Drops that the test shows: {drops}.", drops="; ".join(drops)) if drops else say("No drop of a score is shown.")]
    text.append(say("Rows that the base model has right and SFT + DPO wrong: {turned}.", turned=listed(turned)) if turned else say("On no row is SFT + DPO wrong where the base model is right."))
    if unlearned:
        text.append(say("On held-out rows, without a test: {unlearned}.", unlearned="; ".join(unlearned)))
    return [Heading(say("What got worse")), Text(say(" ").join(text))]


def training(train: Record) -> list[Part]:
    table = [
        [f"{say(stage.upper())} {say(row['measure'])}, {say(row['rows'])}", f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['n']:,} {say(row['unit'])}"]
        for stage, record in train.items()
        for row in record["measured"]
    ]
    return [
        Heading(say("Training")),
        Text(say("Losses in nats: SFT's a token, DPO's a pair. Before its first step DPO's policy is its reference, up to rounding: margins of 0, and ties, which count half.")),
        Table([say("measure"), say("before"), say("after"), "n"], table),
        Figure("training_curves.svg", say("Training curves: SFT loss, DPO loss, reward margin and log-probs by step")),
        *collapsed(train["dpo"]),
    ]


def collapsed(record: Record) -> list[Part]:
    """A warning for each part of the pairs where DPO made the chosen answers much less likely, as it can while the margin grows."""
    of = {(row["rows"], row["measure"]): row for row in record["measured"]}
    notes = []
    for (rows, measure), row in of.items():
        if measure == "chosen log-prob" and row["after"] < COLLAPSE * row["before"]:
            text = say("**Warning**: the log-prob of the chosen answers of {rows} fell from {before:.1f} to {after:.1f} nats.", rows=say(rows), before=row["before"], after=row["after"])
            other = of.get((rows, "rejected log-prob"))
            if other and other["after"] < other["before"]:
                text += " " + say("That of the rejected ones fell from {before:.1f} to {after:.1f}: both are unlearned.", before=other["before"], after=other["after"])
            notes.append(Note(text + " " + say("A larger beta, a lower learning rate or fewer steps hold it back.")))
    return notes


def data_section(data: Record) -> list[Part]:
    names = {
        "raw": say("raw"), "over_limit": say("not taken"), "invalid": say("invalid"), "no_preference": say("no preference"), "overlong": say("too long"),
        "without_labels": say("no label"), "contaminated": say("contaminated"), "duplicate": say("duplicate"), "near_duplicate": say("near-duplicate"),
        "not_drawn": say("not drawn"), "held_out": say("held out"), "train": say("trained on"),
    }  # fmt: skip
    rows = [
        [f"{say(stage.upper())}: {counts['source']}", *(f"{counts['rows'][key]:,}" for key in names), f"{counts['tokens']['train']:,}"]
        for stage in ("sft", "dpo")
        for counts in data[stage]["sources"]
    ]
    (filled,) = (shards for shards in data["sft"]["shards"] if shards["part"] == "train")
    return [
        Heading(say("Data")),
        Text(say("What became of each raw row; the columns after the first add up to it.")),
        Table([say("source"), *names.values(), say("tokens trained on")], rows),
        Text(say("SFT trains on {rows:,} rows of which tokens fill {filled:.1f}%.", rows=filled["rows"], filled=100 * filled["filled"])),
    ]


def contamination(found: Record, summary: Record) -> list[Part]:
    counts = {row["benchmark"]: [f"{row[key]:,}" for key in ("rows", "rows_contaminated", "rows_too_short")] for row in found["benchmarks"]}
    rows = []
    for name in summary["all"]:
        row = summary["clean"].get(name)
        rows.append([pretty(name), *counts.get(name, [""] * 3), *([f"{row['n']:,}", *(percents(row[model]) for model in labels())] if row else [""] * 4)])
    left_out = [pretty(name) for name in summary["all"] if name not in summary["clean"]]
    trained = [say("{source} {contaminated:,} of {rows:,}", source=row["source"], contaminated=row["rows_contaminated"], rows=row["rows"]) for row in found["training"]]
    return [
        Heading(say("Contamination")),
        Text(
            say(
                "Benchmark rows that share 13 words in a row with a raw training row, or that its 8-grams cover to the set part; rows of fewer than 8 words cannot be judged. The "
                "scores are those on the scored rows that are clean, where those are two or more."
            )
        ),
        Table([say("benchmark"), say("rows"), say("contaminated"), say("too short"), say("n, clean"), *labels().values()], rows),
        *([Text(say("Without clean scores, and left out of their mean: {names}.", names=listed(left_out)))] if left_out else []),
        Text(say("Raw training rows that hold a benchmark row: {trained}.", trained="; ".join(trained))),
    ]


def model_name(source: params.Source) -> str:
    """The repository's or the file's own name."""
    return source.repo.split("/")[-1] if isinstance(source, params.HubSource) else Path(source.path).name.split(".")[0]


def source_text(source: params.Source) -> str:
    if isinstance(source, params.HubSource):
        return say("Hub `{repo}` at `{revision}`", repo=source.repo, revision=source.revision)
    if isinstance(source, params.PypiSource):
        return f"PyPI `{source.package}=={source.version}`, `{source.path}`"
    return say("local `{path}`", path=source.path)


def sources(settings: params.Params) -> Table:
    """What the run is made from, with licences."""
    licences = settings.report.licences
    rows = [[say("base model"), source_text(settings.model.source), licences.model]]
    for label, data, stated in ((say("SFT"), settings.data.sft, licences.sft), (say("preferences"), settings.data.preferences, licences.preferences)):
        rows += [[f"{label}: {name}", source_text(item.source), stated.get(name)] for name, item in sorted(data.sources.items())]
    rows += [[pretty(name), source_text(settings.benchmarks[name].source), licences.benchmarks.get(name)] for name in settings.evaluate.benchmarks]
    return Table([say("what"), say("source"), say("licence")], [[what, source, licence or say("not stated")] for what, source, licence in rows])


def hyperparameters(settings: params.Params) -> Table:
    values = [[section, ", ".join(f"{key} {value}" for key, value in getattr(settings, section).model_dump().items())] for section in ("lora", "sft", "dpo")]
    values.append(["model", ", ".join(f"{key} {getattr(settings.model, key)}" for key in ("quantization", "dtype", "attention", "chat_template"))])
    shots = ", ".join(f"{pretty(name)} {settings.benchmarks[name].num_fewshot}" for name in settings.evaluate.benchmarks)
    return Table([say("section"), say("values")], [*values, ["evaluate", say("examples in the prompt: {shots}", shots=shots)], ["seed", str(settings.seed)]])


def setup(settings: params.Params, train: Record) -> list[Part]:
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in LIBRARIES)])
    devices = [f"{say(stage.upper())}: {count} × {name}" for stage, record in train.items() for name, count in Counter(record["devices"]).items()]
    return [
        Heading(say("Setup")),
        sources(settings),
        hyperparameters(settings),
        Text(say("Hardware: {devices}. Versions: {versions}; all packages stand in `requirements.lock`.", devices="; ".join(devices), versions=versions)),
        Text(say("The commit of this run is the last one that changed its lock file: `git log -1 --format=%H -- dvc.lock`.")),
    ]


def cost(train: Record, rows: Record) -> list[Part]:
    trained = [say("{stage} trained {steps:,} steps on {tokens:,} tokens", stage=say(stage.upper()), steps=record["steps"], tokens=record["tokens"]) for stage, record in train.items()]
    text = say("{trained}; {scored:,} rows were scored by each of {models} models.", trained="; ".join(trained), scored=rows["mean"]["n"], models=len(labels()))
    return [
        Heading(say("Cost")),
        Text(text),
        Text(say("Seconds, tokens a second and memory differ from run to run, so they stand beside the hashed files: `plots/sft_speed.csv` and `plots/dpo_speed.csv`. Energy was not measured.")),
    ]


def limits(settings: params.Params, summary: Record, data: Record, merged: Record) -> list[Part]:
    rows = summary["all"]
    limited = [say("{name} {n:,} of {rows:,}", name=pretty(row["benchmark"]), n=rows[row["benchmark"]]["n"], rows=row["rows"]) for row in data["contamination"]["benchmarks"] if rows[row["benchmark"]]["n"] < row["rows"]]
    found = [say("This is one run with one seed ({seed}); how much another seed moves its numbers was not measured.", seed=settings.seed)]
    if limited:
        found.append(say("Only a part of the rows is scored: {limited}.", limited=listed(limited)))
    blind = [pretty(name) for name, row in rows.items() if row["dpo_vs_base"]["detectable"] > 1]
    if blind:
        found.append(say("So few rows are scored that no difference could be shown on: {names}.", names=listed(blind)))
    if held := [pretty(row["benchmark"]) for row in data["contamination"]["benchmarks"] if row["rows_contaminated"]]:
        found.append(say("Rows of these benchmarks are in the raw training data: {names}.", names=listed(held)))
    if settings.model.quantization != "none":
        found.append(
            say(
                "The scores are those of the adapters on a base in {quantization}. The merged model stands on the base's own weights and predicts otherwise: KL divergence {kl:.2g} "
                "nats a token, the same likeliest token at {agreement:.1f}%.",
                quantization=settings.model.quantization.upper(), kl=merged["scored_kl"], agreement=100 * merged["scored_agreement"],
            )
        )
    found.append(say("The benchmarks test knowledge and reasoning in English; safety, honesty and other languages were not tested."))
    return [Heading(say("Limits")), Text(say(" ").join(found))]


def reproduce() -> list[Part]:
    commands = "git checkout $(git log -1 --format=%H -- dvc.lock)\nmake repro\ngit diff --stat -- dvc.lock metrics report"
    return [
        Heading(say("Reproduce")),
        Code(commands),
        Text(
            say(
                "On one machine the last command prints nothing; another kind of processor rounds otherwise. `dvc.lock` names every input and output of this run by its hash; "
                "`python -m stages.lineage` prints the chain behind a number."
            )
        ),
    ]


def card(settings: params.Params, summary: Record, data: Record, train: Record, merged: Record) -> list[Part]:
    """Of the merged model, as the Hub shows it beside the weights."""
    rows = summary["all"]
    name = f"{model_name(settings.model.source)}-sft-dpo"
    scores = [[pretty(one), f"{row['n']:,}", *(percents(row[model]) for model in labels()), verdict(row["dpo_vs_base"])] for one, row in rows.items()]
    use = 'from transformers import pipeline\n\nchat = pipeline("text-generation", "models/final")\nprint(chat([{"role": "user", "content": "Name three colors."}])[0]["generated_text"][-1]["content"])'
    return [
        Heading(name, 1),
        *([Note(settings.report.note)] if settings.report.note else []),
        Text(say("{base}, fine-tuned on instructions (SFT) and on preferences (DPO) with {method}, and merged into one model in bfloat16.", base=model_name(settings.model.source), method=method(settings.lora))),
        Code(use),
        Heading(say("Trained on")),
        sources(settings),
        Text(say("SFT: {sft:,} rows; DPO: {dpo:,} pairs. Who uses the model is bound by the licences of all of them.", sft=data["sft"]["rows"], dpo=data["dpo"]["rows"])),
        hyperparameters(settings),
        Heading(say("Results")),
        Text(say("In percent with 95% intervals; the last column says what a corrected test shows of SFT + DPO against the base model.")),
        Table([say("benchmark"), "n", *labels().values(), say("shown")], scores),
        Text(
            say(
                "Merged model beside the adapter on the same base, on {n:,} held-out tokens: KL divergence {kl:.2g} nats a token, the same likeliest token at {agreement:.1f}%.",
                n=merged["n"], kl=merged["kl"], agreement=100 * merged["agreement"],
            )
        ),
        *what_got_worse(rows, train),
        *limits(settings, summary, data, merged),
    ]


def card_header(settings: params.Params) -> dict[str, Any]:
    """What the Hub reads; only what it knows how to: repositories of its own."""
    hub = {
        "base_model": [settings.model.source],
        "datasets": [source.source for data in (settings.data.sft, settings.data.preferences) for source in data.sources.values()],
    }
    found = {key: [source.repo for source in values if isinstance(source, params.HubSource)] for key, values in hub.items()}
    return {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sft", "dpo", "trl"]} | {key: value for key, value in found.items() if value}
