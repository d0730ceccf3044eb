"""Set base, SFT and DPO side by side: scores, and whether their differences on the same rows are more than chance.

`metrics/summary.json` is numbers alone, so that `dvc metrics diff` shows them: `all`, an entry a benchmark and one for their mean, and `clean`, the same
without rows that are in the raw training data; there a benchmark with fewer than two rows left has no entry, and no part in the mean. `metrics/summary.md` is the
same as a table. Scores and differences have 95% intervals, as `stages.statistics` says; p-values are corrected for the number of comparisons, of the benchmarks and of
the mean each for itself.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from stages import InputError, command, first_line, params, provenance, statistics
from stages.records import read_json, read_parquet, write_json, write_text

MODELS = ("base", "sft", "dpo")
COMPARISONS = {"sft_vs_base": ("sft", "base"), "dpo_vs_sft": ("dpo", "sft"), "dpo_vs_base": ("dpo", "base")}
Correct = dict[str, dict[int, float]]
"""Of each model, the score of each row by its number."""


def run(settings: params.Params, metrics: Path, evals: Path, contamination: Path, summary: Path, markdown: Path, plot: Path) -> None:
    correct: dict[str, dict[str, Correct]] = {"all": {}, "clean": {}}
    for name in settings.evaluate.benchmarks:
        found = {model: scored(name, model, metrics, evals) for model in MODELS}
        check_protocols({str(metrics / model / f"{name}.json"): record for model, (record, _) in found.items()})
        correct["all"][name] = every = {model: rows for model, (_, rows) in found.items()}
        in_data = set(read_parquet(contamination / f"{name}.parquet")["doc_id"].to_pylist())
        clean = {model: {row: value for row, value in values.items() if row not in in_data} for model, values in every.items()}
        if len(clean["base"]) > 1:
            correct["clean"][name] = clean
    tables = {rows: table(found, COMPARISONS, settings.seed) for rows, found in correct.items()}
    share = share_of_gain(tables["all"]["mean"]["dpo_vs_base"], correct["all"], settings.seed)
    write_json(summary, tables | ({"share_of_gain": share} if share else {}))
    write_text(markdown, in_markdown(tables["all"], MODELS, COMPARISONS))
    write_json(plot, bars(tables["all"]))


def check_protocols(found: dict[str, dict[str, Any]]) -> None:
    """Scores of different protocols are not set side by side.

    Args:
        found: the metrics of some models on one benchmark, by their files.
    """
    (first, one), *rest = found.items()
    for file, record in found.items():
        if "protocol_parts" not in record:
            raise InputError(f"{file}: it does not say how it was scored; `dvc repro` scores anew")
    for file, other in rest:
        own, theirs = ([str(part) for part in a["protocol_parts"] if part not in b["protocol_parts"]] for a, b in ((one, other), (other, one)))
        if own or theirs:
            raise InputError(
                f"{first} and {file} are scores of different protocols ({', '.join(own) or 'nothing'} and {', '.join(theirs) or 'nothing'}); `dvc repro` scores them alike, "
                f"and after an upgrade of a library, which DVC does not see, `dvc repro --force --single-item evaluate`"
            )


def table(correct: Mapping[str, Correct], comparisons: Mapping[str, tuple[str, str]], seed: int) -> dict[str, dict[str, Any]]:
    """An entry a benchmark and one for their mean: `n`, of each model what `statistics.score` says, of each comparison what `statistics.compared` says and `holm`.

    Args:
        correct: of each benchmark.
        comparisons: two models each, the second to be taken from the first.
    """
    if not correct:
        return {}
    scores = {name: {model: statistics.score(list(values.values())) for model, values in models.items()} for name, models in correct.items()}
    differences = {name: {label: paired(models[a], models[b], name) for label, (a, b) in comparisons.items()} for name, models in correct.items()}
    rows = {name: {"n": len(next(iter(models.values()))), **scores[name]} for name, models in correct.items()}
    mean = {model: statistics.mean_score([own[model] for own in scores.values()]) for model in next(iter(scores.values()))}
    strata = {name: {label: [values] for label, values in own.items()} for name, own in differences.items()}
    families = [strata, {"mean": {label: [own[label] for own in differences.values()] for label in comparisons}}]
    rows["mean"] = {"n": sum(row["n"] for row in rows.values()), **mean}
    for family in families:
        tests = len(family) * len(comparisons)
        found = {(name, label): statistics.compared(values, seed, tests) for name, own in family.items() for label, values in own.items()}
        corrected = statistics.holm({key: value["p"] for key, value in found.items()})
        for (name, label), value in found.items():
            rows[name][label] = value | {"holm": corrected[name, label]}
    return rows


def read_correct(file: Path, n: int) -> dict[int, float]:
    table = read_parquet(file)
    found = dict(zip(table["doc_id"].to_pylist(), table["correct"].to_pylist(), strict=True))
    if not len(found) == table.num_rows == n:
        raise InputError(f"{file}: {table.num_rows} rows of {len(found)} documents, expected one for each of the {n} scored; `dvc repro` scores them anew")
    return found


def paired(first: dict[int, float], second: dict[int, float], name: str) -> np.ndarray:
    """(rows,): first minus second on the same rows."""
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise InputError(f"{name}: the models were scored on different rows (doc_id {odd[0]} and {len(odd) - 1} more); `dvc repro` scores them alike")
    return np.array([first[key] - second[key] for key in sorted(first)])


def share_of_gain(whole: Mapping[str, float], correct: Mapping[str, Correct], seed: int) -> dict[str, dict[str, float]]:
    """What part of the gain in mean score SFT and DPO each brought, with its interval; nothing where no gain is shown.

    Args:
        whole: the comparison of the mean scores of DPO and base.
        correct: of each benchmark.
    """
    if whole["difference"] <= 0 or not statistics.shown(whole):
        return {}
    differences = {label: [paired(models[a], models[b], name) for name, models in correct.items()] for label, (a, b) in COMPARISONS.items()}
    return {stage: statistics.share(differences[label], differences["dpo_vs_base"], seed) for stage, label in (("sft", "sft_vs_base"), ("dpo", "dpo_vs_sft"))}


def in_markdown(rows: dict[str, dict[str, Any]], models: Iterable[str], comparisons: Iterable[str]) -> str:
    """In percent: scores, and differences with their 95% intervals and corrected p."""
    header = ["benchmark", "n", *models, *comparisons]
    lines = [header, ["---"] * len(header)]
    for name, row in rows.items():
        scores = [f"{statistics.percent(row[model]['score']):.1f}" for model in models]
        lines.append([name, f"{row['n']:,}", *scores, *(statistics.text(row[label]) for label in comparisons)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bars(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What `.dvc/plots/scores.json` draws."""
    return [{"benchmark": name, "model": model, **row[model]} for name, row in rows.items() for model in MODELS]


def against(settings: params.Params, revision: str, metrics: Path, evals: Path) -> str:
    """Whether this run's models score otherwise than those of a git revision or an experiment, whose samples come from DVC's cache or remote.

    Raises:
        InputError: there is no such revision, this run's scores are not there or not those of dvc.lock, or no benchmark can be set beside that of the revision.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    expected = f"--against: found {revision!r}, expected a git revision, or an experiment of `dvc exp list`"
    if not revision.strip():
        raise InputError(expected)
    names = settings.evaluate.benchmarks
    now = {(name, model): scored(name, model, metrics, evals) for name in names for model in MODELS}
    check_recorded([file for name in names for model in MODELS for file in files(name, model, metrics, evals)])
    try:
        then = DVCFileSystem(rev=revision, subrepos=False)
        # which looks for the revision
        known = {Path(file).stem for model in MODELS for file in then.find(str(metrics / model)) if then.exists(str(metrics / model))}
    except DvcException as error:
        raise InputError(f"{expected} ({error})") from error
    correct: dict[str, Correct] = {}
    left_out = [f"{name} is left out: only {revision} has it" for name in sorted(known - set(names))]
    with TemporaryDirectory() as temporary:
        for name in names:
            if name not in known:
                left_out.append(f"{name} is left out: {revision} has no scores of it")
                continue
            try:
                found: Correct = {}
                for model in MODELS:
                    own = files(name, model, metrics, evals)
                    theirs = files(name, model, Path(temporary) / "metrics", Path(temporary) / "evals")
                    for file, copy in zip(own, theirs, strict=True):
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        fetched(then, file, copy, revision)
                    record, rows = now[name, model]
                    before = read_json(theirs[0])
                    check_protocols({str(own[0]): record, f"{own[0]} of {revision}": before})
                    found |= {model: rows, f"{model}, {revision}": read_correct(theirs[1], before["n"])}
                    paired(rows, found[f"{model}, {revision}"], name)
                correct[name] = found
            except InputError as error:
                left_out.append(f"{name} is left out: {error}")
    if not correct:
        raise InputError("\n".join([f"--against {revision}: nothing can be compared", *left_out]))
    comparisons = {f"{model}: now − {revision}": (model, f"{model}, {revision}") for model in MODELS}
    rows = table(correct, comparisons, settings.seed)
    answers = [f"{label}: the mean score {statistics.claim(rows['mean'][label])}." for label in comparisons]
    return "\n".join([in_markdown(rows, next(iter(correct.values())), comparisons), *left_out, *answers])


def files(name: str, model: str, metrics: Path, evals: Path) -> tuple[Path, Path]:
    """A model's metrics on a benchmark, and its rows there."""
    return metrics / model / f"{name}.json", evals / model / f"{name}.parquet"


def scored(name: str, model: str, metrics: Path, evals: Path) -> tuple[dict[str, Any], dict[int, float]]:
    """A model's metrics on a benchmark, and the score of each row."""
    record, rows = files(name, model, metrics, evals)
    found = read_json(record)
    return found, read_correct(rows, found["n"])


def check_recorded(paths: Iterable[Path]) -> None:
    """Files that were changed by hand, or that a stage which failed left, are not this run's.

    Raises:
        InputError: dvc.lock has another hash of one.
    """
    lock = YAML(typ="safe").load(Path("dvc.lock"))
    recorded = {out["path"]: out["md5"] for entry in lock["stages"].values() for out in entry.get("outs", [])}
    for path in paths:
        if provenance.md5(path) != recorded.get(path.as_posix()):
            raise InputError(f"{path}: it is not what dvc.lock says that this run made; `dvc repro` makes it anew, `dvc checkout {path}` restores it")


def fetched(then: Any, file: Path, copy: Path, revision: str) -> None:
    """Raises InputError: neither git, nor the cache, nor a remote has it."""
    try:
        then.get_file(str(file), str(copy))
    # each kind of remote has errors of its own
    except Exception as error:
        raise InputError(f"{file} of {revision} is in no cache and on no remote ({first_line(error)}); `dvc fetch --all-commits` or `dvc exp pull` brings it") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=Path, default="metrics")
    parser.add_argument("--evals", type=Path, default="evals")
    for name in ("contamination", "summary", "markdown", "plot"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--against", metavar="REV", help="instead: is the change of scores since this git revision or experiment real?")
    arguments = vars(parser.parse_args())
    revision = arguments.pop("against")
    if revision is not None:
        print(against(params.load(), revision, arguments["metrics"], arguments["evals"]))
        return
    missing = [name for name, value in arguments.items() if value is None]
    if missing:
        parser.error(f"--{missing[0]} is not given; `dvc repro compare` makes the summary, `python -m stages.compare --against REV` compares with another revision")
    run(params.load(), **arguments)


if __name__ == "__main__":
    command(main)
