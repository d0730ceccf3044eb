"""Which stages a change makes stale: of a param, of a file of code, another file or a library's version.

A stage that reads the change reruns. The stages behind it rerun only if what they read came out different.
"""

from collections.abc import Iterable
from pathlib import Path

from dvc.repo import Repo

from reprotune import dvc_yaml, fingerprints, params_file
from reprotune.errors import InputError
from reprotune.params import Params
from reprotune.pipeline.reads import ALWAYS, Pipeline


def is_key(settings: Params, what: str) -> bool:
    """Whether params.yaml has a value, or a section, at this dotted key."""
    try:
        dvc_yaml.value_of(settings.model_dump(), what)
    except (KeyError, TypeError):
        return False
    return True


def run(changes: list[str]) -> None:
    """Print what each change makes stale; without changes, what is stale now."""
    settings = params_file.load()
    with Repo() as repo:
        pipeline = Pipeline(repo)
        if not changes:
            print_stale(pipeline, repo)
        for change in changes:
            print(answer(pipeline, settings, change))


def answer(pipeline: Pipeline, settings: Params, change: str) -> str:
    """One line: the stages that read a change, and those behind them.

    Raises:
        InputError: no stage can read it.
    """
    what = str(Path(change)) if "/" in change else change
    if not ((pipeline.root / what).exists() or what in fingerprints.LIBRARIES or is_key(settings, what)):
        raise InputError(
            f"found {change!r}, expected a key of params.yaml such as dpo.beta, a file, or one of the "
            f"libraries {', '.join(fingerprints.LIBRARIES)}"
        )
    directly, behind = texts(pipeline, pipeline.reading(what))
    return f"{what}: {directly or 'nothing'}" + (
        f"; behind, if what those make differs: {behind}" if behind else ""
    )


def print_stale(pipeline: Pipeline, repo: Repo) -> None:
    """What `dvc repro` would run, with the code that changed since its fingerprint was taken."""
    stale = set(repo.status())
    now = fingerprints.of_stages(pipeline.root)
    then = dvc_yaml.load(pipeline.root / dvc_yaml.CODE) or {}
    by_code = {name for name in pipeline.stages if now.get(base := name.partition("@")[0]) != then.get(base)}
    by_code -= ALWAYS
    stale |= by_code
    if not stale:
        print("nothing is stale")
        return
    for name in pipeline.ordered(stale):
        print(f"{name}: stale" + (", its code changed" if name in by_code else ""))
    for name in pipeline.ordered(pipeline.behind(stale)):
        print(f"{name}: reruns if what it reads comes out different")


def texts(pipeline: Pipeline, reading: set[str], changed: str | None = None) -> tuple[str, str]:
    """The stages that read a change and those behind them, each as text in the pipeline's order.

    Args:
        changed: the benchmark whose param is changed.
    """
    behind = pipeline.behind(reading)
    # the other cells behind a benchmark's own are all of that model
    models = {name.split("-")[0] for name in behind if "@" in name}
    behind |= {name for name in reading if name.split("-")[0] in models}
    everything = instances(pipeline.stages)
    first, second = (
        ", ".join(
            text
            for stage, found in instances(pipeline.ordered(names)).items()
            for text in of_stage(stage, found, everything[stage], changed)
        )
        for names in (reading, behind)
    )
    return first, second


def instances(names: Iterable[str]) -> dict[str, set[str]]:
    """What the stages' names have behind `@`, by what they have before it."""
    found: dict[str, set[str]] = {}
    for name in names:
        stage, _, instance = name.partition("@")
        found.setdefault(stage, set()).add(instance)
    return found


def of_stage(stage: str, found: set[str], everything: set[str], changed: str | None) -> list[str]:
    """Texts for some instances of a stage: cells of all models or of all benchmarks as one.

    Args:
        everything: all of the stage's instances.
        changed: the benchmark whose param is changed.
    """
    if found == everything:
        return [stage]

    def shown(name: str) -> str:
        return "<b>" if name == changed else name

    if stage != "evaluate":
        return [f"{stage}@{shown(name)}" for name in sorted(found)]
    benchmarks = {cell.partition("-")[2] for cell in everything}
    by_model = {
        model: {cell.partition("-")[2] for cell in found if cell.startswith(f"{model}-")}
        for model in ("base", "sft", "dpo")
    }
    if len(scored := set.union(*by_model.values())) == 1 and all(by_model.values()):
        return [f"{stage}@*-{shown(scored.pop())}"]
    return [
        f"{stage}@{model}-{part}"
        for model, names in by_model.items()
        for part in (["*"] if names == benchmarks else sorted(map(shown, names)))
    ]
