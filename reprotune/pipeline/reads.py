"""What each stage of dvc.yaml reads: params, files, and through its fingerprint code and libraries."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import networkx
from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import Stage

from reprotune import dvc_yaml, fingerprints, params_file
from reprotune.dvc_lock import way_back
from reprotune.errors import InputError, first_line

ALWAYS = {"check_params", "code"}
"""They read every param and all code, and what they write makes no other stage stale by itself."""


class Pipeline:
    """DVC's stages by name, and what each reads."""

    def __init__(self, repo: Repo) -> None:
        try:
            self.stages: dict[str, Stage] = {stage.addressing: stage for stage in repo.index.stages}
            self.graph = repo.index.graph
        except DvcException as error:
            raise unreadable(error) from error
        self.root = Path(repo.root_dir)

    def reading(self, what: str) -> set[str]:
        """The stages that read a param (dotted key), a file, or a library (`trl`)."""
        modules: set[str] = set()
        if what.endswith(".py") and what.split("/")[0] in fingerprints.PACKAGES:
            modules = {name for name, files in self.code.items() if what in files}
        elif what in fingerprints.LIBRARIES:
            modules = {name for name, libraries in self.libraries.items() if what in libraries}
            what = fingerprints.LOCK
        declaring = {name for name, deps in self.declared.items() if any(covers(dep, what) for dep in deps)}
        return declaring | {name for name in self.stages if name.partition("@")[0] in modules}

    def behind(self, names: Iterable[str]) -> set[str]:
        """The stages that depend on what these make."""
        found: set[str] = set()
        for name in set(names) - ALWAYS:
            # an edge leads from a stage to the one that it depends on
            found |= {stage.addressing for stage in networkx.ancestors(self.graph, self.stages[name])}
        return found - set(names)

    def ordered(self, names: Iterable[str]) -> list[str]:
        wanted = set(names)
        return [name for name in self.stages if name in wanted]

    @cached_property
    def declared(self) -> dict[str, list[str]]:
        """By stage, its deps and its keys of params.yaml."""
        return {name: list(reads(stage)) for name, stage in self.stages.items() if name not in ALWAYS}

    @cached_property
    def code(self) -> dict[str, set[str]]:
        """The files of code that a stage reaches, by its module in stages/."""
        reached = {name: fingerprints.reached(self.root, [f"stages.{name}"]) for name in self.modules}
        return {
            name: {file.relative_to(self.root).as_posix() for file in files.values()}
            for name, files in reached.items()
        }

    @cached_property
    def libraries(self) -> dict[str, set[str]]:
        """The libraries whose version is part of a stage's fingerprint, by its module in stages/."""
        return {name: set(fingerprints.versions(self.root, name)) for name in self.modules}

    @cached_property
    def modules(self) -> set[str]:
        """The modules in stages/ that have a fingerprint."""
        return {name.partition("@")[0] for name in self.stages} - ALWAYS

    def files(self) -> list[str]:
        """The deps that are templates or configs."""
        paths = {dep for deps in self.declared.values() for dep in deps if "/" in dep}
        return sorted(path for path in paths if path.split("/")[0] not in dvc_yaml.MADE)


def unreadable(error: DvcException) -> InputError:
    """The error for a pipeline that DVC cannot read; raises that of params.yaml if this is at fault."""
    params_file.load()
    return InputError(f"dvc.yaml or dvc.lock cannot be read ({first_line(error)}); {way_back()}")


def reads(stage: Stage) -> Iterator[str]:
    for dep in stage.deps:
        if not isinstance(dep, ParamsDependency):
            yield dep.def_path
        elif dep.def_path == str(dvc_yaml.PARAMS):
            yield from dep.params


def covers(declared: str, what: str) -> bool:
    """Whether a stage that declares the one reads the other."""
    if declared == what:
        return True
    separator = "/" if "/" in what else "."
    inside = "/" not in what and declared.startswith(what + separator)
    return what.startswith(declared + separator) or inside
