"""The sections on how the run was set up and how to reproduce it, and the tables that the card shares."""

from collections.abc import Mapping
from pathlib import Path

from reprotune import params
from reprotune.fingerprints import locked_versions
from reprotune.report.document import Code, Heading, Part, Table, Text
from reprotune.report.names import benchmark_name
from reprotune.report.translation import say

LIBRARIES = (
    ""
    "torch", "transformers", "trl", "peft", "bitsandbytes",
    "accelerate", "deepspeed", "datasets", "lm_eval", "dvc",
)  # fmt: skip
"""Libraries whose versions the report names, by import name."""


def setup(settings: params.Params, lock: Path) -> list[Part]:
    """The section "Setup".

    Args:
        lock: the requirements file that pins the libraries.
    """
    pinned = locked_versions(lock)
    versions = ", ".join(f"{name} {pinned[name]}" for name in LIBRARIES)
    return [
        Heading(say("Setup")),
        sources(settings),
        hyperparameters(settings),
        Text(say("Versions: {versions}; all packages stand in `requirements.lock`.", versions=versions)),
        Text(
            say(
                "The commit of this run is the last one that changed its lock file: "
                "`git log -1 --format=%H -- dvc.lock`."
            )
        ),
    ]


def sources(settings: params.Params) -> Table:
    """The base model, data and benchmarks, with their licences."""
    return table_of(training_sources(settings) + benchmark_sources(settings))


def table_of(rows: list[list[str]]) -> Table:
    return Table([say("what"), say("source"), say("licence")], rows)


def training_sources(settings: params.Params) -> list[list[str]]:
    licences, data = settings.report.licences, settings.data
    return [
        source_row(say("base model"), settings.model.source, licences.model),
        *data_rows(say("SFT"), data.sft.sources, licences.sft),
        *data_rows(say("preferences"), data.preferences.sources, licences.preferences),
    ]


def benchmark_sources(settings: params.Params) -> list[list[str]]:
    licences = settings.report.licences.benchmarks
    return [
        source_row(benchmark_name(name), settings.benchmarks[name].source, licences.get(name))
        for name in settings.evaluate.benchmarks
    ]


def data_rows(
    label: str,
    sources: Mapping[str, params.SftSource | params.PreferenceSource],
    licences: Mapping[str, str],
) -> list[list[str]]:
    return [
        source_row(f"{label}: {name}", item.source, licences.get(name))
        for name, item in sorted(sources.items())
    ]


def source_row(what: str, source: params.Source, licence: str | None) -> list[str]:
    return [what, source_text(source), licence or say("not stated")]


def source_text(source: params.Source) -> str:
    if isinstance(source, params.HubSource):
        return say("Hub `{repo}` at `{revision}`", repo=source.repo, revision=source.revision)
    if isinstance(source, params.PypiSource):
        return f"PyPI `{source.package}=={source.version}`, `{source.path}`"
    if isinstance(source, params.SplitSource):
        return f"`{source.path}`: {' + '.join(map(source_text, source.parts))}"
    return say("local `{path}`", path=source.path)


def model_name(source: params.Source) -> str:
    """The last part of the repository's name, or the file's name without suffixes."""
    if isinstance(source, params.HubSource):
        return source.repo.split("/")[-1]
    return Path(source.path).name.split(".")[0]


def method(lora: params.Lora) -> str:
    if lora.method == "full":
        return say("all weights")
    return f"{'LoRA' if lora.method == 'lora' else 'DoRA'} r {lora.r}"


def hyperparameters(settings: params.Params) -> Table:
    rows = [[name, listing(getattr(settings, name))] for name in ("lora", "sft", "dpo")]
    shots = ", ".join(
        f"{benchmark_name(name)} {settings.benchmarks[name].num_fewshot}"
        for name in settings.evaluate.benchmarks
    )
    return Table(
        [say("section"), say("values")],
        [
            *rows,
            ["model", listing(settings.model, "quantization", "dtype", "attention", "chat_template")],
            ["evaluate", say("examples in the prompt: {shots}", shots=shots)],
            ["seed", str(settings.seed)],
        ],
    )


def listing(section: params.Section, *keys: str) -> str:
    """The values of these keys of a section of params.yaml, or of all of them."""
    values = section.model_dump()
    return ", ".join(f"{key} {values[key]}" for key in keys or values)


def reproduce() -> list[Part]:
    """The section "Reproduce"."""
    commands = [
        "git checkout $(git log -1 --format=%H -- dvc.lock)",
        "make repro",
        "git diff --stat -- dvc.lock metrics report",
    ]
    return [
        Heading(say("Reproduce")),
        Code("\n".join(commands)),
        Text(
            say(
                "On one machine the last command prints nothing; another kind of processor rounds otherwise. "
                "`dvc.lock` names every input and output of this run by its hash; `reprotune lineage` prints "
                "the chain behind a number."
            )
        ),
    ]
