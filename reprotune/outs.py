"""Outs hold what stages made and nothing else: no source lies there, and nothing that params no longer name.

DVC deletes a stage's outs before it runs the stage.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from reprotune import dvc_lock, dvc_yaml
from reprotune.errors import InputError
from reprotune.params import LocalSource, Params, Source

LINKS = 40
"""Symbolic links that Linux follows at most."""
NAMED = 3
"""Paths that an error message names."""

Places = dict[Path, tuple[Path, str]]
"""By real path, the place that it leads to, and why no source may lie there."""


def check_sources(settings: Params) -> None:
    """Refuse a local source in a place where DVC or a stage deletes or changes files.

    Raises:
        InputError: naming the source's key and the place.
    """
    taken: Places = {}
    for place, why in places():
        for real in ways(place):
            taken.setdefault(real, (place, why))
    holding: Places = {}
    for real, found in taken.items():
        for parent in real.parents:
            holding.setdefault(parent, found)
    for key, source in local_sources(settings):
        for part in with_links(Path(source.path)):
            for way in ways(part):
                if relation := related(way, taken, holding):
                    what = "which" if part == Path(source.path) else f"of which {part}"
                    raise InputError(
                        f"params.yaml: {key}.path: found {source.path!r}, {what} {relation}; "
                        "move the data elsewhere and put its new path here. Nothing was changed"
                    )


def local_sources(settings: Params) -> Iterator[tuple[str, LocalSource]]:
    """Each local source, by its key in params.yaml."""
    sources: dict[str, Source] = {"model.source": settings.model.source}
    for name, sft in settings.data.sft.sources.items():
        sources[f"data.sft.sources.{name}.source"] = sft.source
    for name, pairs in settings.data.preferences.sources.items():
        sources[f"data.preferences.sources.{name}.source"] = pairs.source
    for name, benchmark in settings.benchmarks.items():
        sources[f"benchmarks.{name}.source"] = benchmark.source
    for key, source in sources.items():
        if isinstance(source, LocalSource):
            yield key, source


def places() -> Iterator[tuple[Path, str]]:
    """All that dvc.yaml names, and the folders of DVC and git, each with what is done there."""
    stages = dvc_yaml.all_stages()
    for name, stage in stages.items():
        for out in stage.outs:
            yield out, f"an out of {name}, which DVC deletes before it runs {name}"
    for name, stage in stages.items():
        for dep in stage.folders:
            yield dep, f"where stages write what {name} reads"
        for dep in stage.files:
            yield dep, f"a part of this project that {name} reads"
    yield Path(".dvc"), "DVC's own folder"
    yield Path(".git"), "git's own folder"


def with_links(path: Path) -> Iterator[Path]:
    """The path, and then the symbolic links in it, for which a folder is searched."""
    yield path
    if path.is_dir():
        yield from (entry for entry in path.rglob("*") if entry.is_symlink())


def ways(path: Path) -> Iterator[Path]:
    """The paths that lead to what lies at `path`: of itself and of what each link leads to, `..` resolved."""
    yield Path(os.path.realpath(path))
    for _ in range(LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        yield path
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()


def related(path: Path, taken: Places, holding: Places) -> str:
    """How a path lies to one of the places, and why nothing may; empty if it has nothing to do with any."""
    if path in taken:
        return "is {}, {}".format(*taken[path])
    for parent in path.parents:
        if parent in taken:
            return "lies in {}, {}".format(*taken[parent])
    return "holds {}, {}".format(*holding[path]) if path in holding else ""


def all_outs() -> list[Path]:
    return [out for stage in dvc_yaml.all_stages().values() for out in stage.outs]


def remove_leftovers() -> None:
    """Delete what a stage made that dvc.yaml and params.yaml no longer name, as of a removed benchmark.

    Others depend on the folder that it lies in, and a clone would not have it. What is no longer as
    dvc.lock says, or was never there, is somebody's: it stays.
    """
    named = all_outs()
    for stage in dvc_lock.read_stages().values():
        for out in stage.get("outs", []):
            path = Path(out["path"])
            if path.parts[0] not in dvc_yaml.MADE or any(
                path.is_relative_to(other) or other.is_relative_to(path) for other in named
            ):
                continue
            if path.exists() and dvc_lock.md5(path) == out.get("md5"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                print(f"{path}: removed; a stage made it for params that are no longer there")


def check_folders(name: str) -> None:
    """Refuse what no stage made in a folder of outs that a stage depends on: a clone would not have it.

    Raises:
        InputError: naming what was found.
    """
    folders = dvc_yaml.declared(name).folders
    outs = all_outs()
    shared = [folder for folder in folders if any(folder in out.parents for out in outs)]
    strange = [
        str(file)
        for folder in shared
        for file in sorted(dvc_lock.tracked(folder))
        if not any(file.is_relative_to(out) for out in outs)
    ]
    if strange:
        more = f" and {len(strange) - NAMED} more" if len(strange) > NAMED else ""
        raise InputError(
            f"{', '.join(strange[:NAMED])}{more}: made by no stage of this commit, in a folder that {name} "
            "depends on, so that a clone without it would be stale; move what is yours elsewhere, "
            "`dvc checkout` removes what stages of another commit made"
        )
