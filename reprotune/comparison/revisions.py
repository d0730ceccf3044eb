"""`reprotune compare --against`: whether the models score differently from those of another revision."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from reprotune import dvc_lock, params
from reprotune.comparison import wording
from reprotune.comparison.scores import (
    MEAN,
    MODELS,
    ModelScores,
    RowScores,
    cell_files,
    check_protocols,
    paired,
    read_cell,
)
from reprotune.comparison.table import in_markdown, table
from reprotune.errors import InputError, first_line

if TYPE_CHECKING:
    from dvc.fs import FileSystem

Cells = Mapping[str, tuple[dict[str, Any], RowScores]]
"""The metrics and row scores of one benchmark, by model."""


def against(settings: params.Params, revision: str, metrics: Path, evals: Path) -> str:
    """Compare each model with that of a git revision or an experiment, on the rows that both scored.

    Args:
        metrics, evals: folders of cells, relative to the repository.

    Returns:
        A table, the benchmarks left out with the reason, and a sentence for each model.

    Raises:
        InputError: there is no such revision, this run's cells are missing or not those of dvc.lock, or no
            benchmark can be compared.
    """
    if not revision.strip():
        raise unknown(revision)
    names = settings.evaluate.benchmarks
    files = {name: {model: cell_files(name, model, metrics, evals) for model in MODELS} for name in names}
    check_recorded(file for models in files.values() for cell in models.values() for file in cell)
    current = {name: {model: read_cell(*files[name][model]) for model in MODELS} for name in names}
    benchmarks: dict[str, ModelScores] = {}
    with opened(revision, metrics) as (then, known):
        left_out = [f"{name} is left out: only {revision} has it" for name in sorted(known - set(names))]
        for name in names:
            try:
                if name not in known:
                    raise InputError(f"{revision} has no scores of it")
                benchmarks[name] = with_revision(name, files[name], current[name], then, revision)
            except InputError as error:
                left_out.append(f"{name} is left out: {error}")
    if not benchmarks:
        raise InputError("\n".join([f"--against {revision}: nothing can be compared", *left_out]))
    comparisons = {f"{model}: now − {revision}": (model, at(revision, model)) for model in MODELS}
    rows = table(benchmarks, comparisons, settings.seed)
    columns = [column for model in MODELS for column in (model, at(revision, model))]
    claims = [f"{label}: the mean score {wording.claim(rows[MEAN][label])}." for label in comparisons]
    return "\n".join([in_markdown(rows, columns, comparisons), *left_out, *claims])


def at(revision: str, model: str) -> str:
    """The name of a revision's model."""
    return f"{model}, {revision}"


def unknown(revision: str, reason: str = "") -> InputError:
    return InputError(
        f"--against: found {revision!r}, expected a git revision, or an experiment of `dvc exp list`{reason}"
    )


def check_recorded(paths: Iterable[Path]) -> None:
    """Refuse files that were changed by hand, or that a failed stage left.

    Raises:
        InputError: dvc.lock has another hash.
    """
    stages = dvc_lock.read_stages()
    recorded = {out["path"]: out["md5"] for entry in stages.values() for out in entry.get("outs", [])}
    for path in paths:
        # strict: FileNotFoundError if it is not there
        if dvc_lock.md5(path.resolve(strict=True)) != recorded.get(path.as_posix()):
            raise InputError(
                f"{path}: its content is not the one that dvc.lock records; `dvc repro` makes it again"
            )


@contextmanager
def opened(revision: str, metrics: Path) -> Iterator[tuple["FileSystem", set[str]]]:
    """Yield the files of a revision, and the benchmarks that it has scores of.

    Paths are those in the project, which may be a subfolder of the git repository.

    Raises:
        InputError: there is no such revision, or git cannot be asked.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from pygit2 import GitError

    with ExitStack() as stack:
        try:
            repo = stack.enter_context(Repo())
            stack.enter_context(repo.switch(revision))
            files = [file for model in MODELS for file in repo.dvcfs.find(str(metrics / model))]
        except DvcException as error:
            raise unknown(revision, f" ({error})") from error
        # such as that another user owns it
        except GitError as error:
            raise InputError(
                f"--against: git cannot open the repository ({error}); `git status` says what to do"
            ) from error
        yield repo.dvcfs, {Path(file).stem for file in files}


def with_revision(
    benchmark: str,
    files: Mapping[str, tuple[Path, Path]],
    current: Cells,
    then: "FileSystem",
    revision: str,
) -> ModelScores:
    """The row scores of each model of this run and of the revision.

    Args:
        files: of this run's cells, by model; the revision has them under the same paths.

    Raises:
        InputError: the revision's cells cannot be had, or have another protocol or other rows.
    """
    models: ModelScores = {}
    with TemporaryDirectory() as temporary:
        for model, cell in files.items():
            copies = [fetched(then, file, Path(temporary) / file, revision) for file in cell]
            record, scores = current[model]
            try:
                record_then, scores_then = read_cell(*copies)
            except InputError as error:
                raise InputError(
                    f"{cell[0]} of {revision} has another form; another version of this code wrote it"
                ) from error
            check_protocols({str(cell[0]): record, f"{cell[0]} of {revision}": record_then})
            paired(scores, scores_then, benchmark)
            models |= {model: scores, at(revision, model): scores_then}
    return models


def fetched(then: "FileSystem", file: Path, copy: Path, revision: str) -> Path:
    """Copy a revision's file from git, DVC's cache or its remote.

    Raises:
        InputError: none of them has it.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        then.get_file(str(file), str(copy))
    # each kind of remote raises errors of its own
    except Exception as error:
        raise InputError(
            f"{file} of {revision} is in no cache and on no remote ({first_line(error)}); "
            "`dvc fetch --all-commits` or `dvc exp pull` brings it"
        ) from error
    return copy
