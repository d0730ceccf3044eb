"""Check what DVC trusts: the objects of its cache and of a remote, the workspace and local sources.

DVC takes a write-protected object in the cache to be whole, and on a remote every object that is there, and
every file of a folder whose list is there. It does not look again at a source that it has fetched. Nothing
is changed unless damaged objects are to be removed, so that DVC fetches, pushes or makes them anew.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

from dvc.config import ConfigError
from dvc.dependency import ParamsDependency
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc_data.hashfile.db import HashFileDB
from tqdm import tqdm

from reprotune import dvc_lock
from reprotune.data.sources import local_sha256
from reprotune.errors import InputError
from reprotune.pipeline.lineage import sources_in
from reprotune.pipeline.objects import Contents, read_all
from reprotune.pipeline.reads import unreadable

CACHE = "cache"
NAMED = 3
"""Paths that a line names at most."""


def run(remote: str | None, remove: bool) -> bool:
    """Print what is wrong; True if nothing is.

    Args:
        remote: the DVC remote whose objects are checked, too.
        remove: remove damaged objects, and what killed transfers left. Not while another process pushes or
        pulls.

    Raises:
        InputError: there is no such remote, or it cannot be reached.
    """
    # DVC's own databases are not needed, and on a full disk they could not be opened
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, {"DVC_SITE_CACHE_DIR": folder}),
        Repo() as repo,
    ):
        outs = recorded(repo)
        places = [read_all(CACHE, repo.cache.local)]
        if remote is not None:
            places.append(read_all(f"remote {remote}", remote_objects(repo, remote)))
            places[-1].blame_incomplete_folders()
        listings = {oid: files for contents in places for oid, files in contents.listings.items()}
        unlike = list(workspace(outs, listings))
        needed = owners(outs, listings)
        wrong = sum(report(contents, needed, remove) for contents in places) + len(unlike)
        for line in unlike:
            print(f"workspace: {line}")
        print(f"workspace: {len(unlike):,} of {len(outs):,} outs are not as dvc.lock has them")
        wrong += changed_sources(repo)
        for name, config in repo.config["remote"].items():
            # remotes that name another one have no default
            if not config.get("verify"):
                wrong += 1
                print(
                    f"remote {name}: pulled objects are not checked; `dvc remote modify {name} verify true` "
                    "checks them"
                )
    print("nothing is wrong" if wrong == 0 else f"{wrong:,} {'fault' if wrong == 1 else 'faults'}")
    return wrong == 0


def recorded(repo: Repo) -> list[Output]:
    """All outs, with what dvc.lock says of them."""
    try:
        return [out for stage in repo.index.stages for out in stage.outs]
    except DvcException as error:
        raise unreadable(error) from error


def remote_objects(repo: Repo, name: str) -> HashFileDB:
    try:
        return repo.cloud.get_remote_odb(name, "fsck")
    except ConfigError as error:
        known = ", ".join(sorted(repo.config["remote"]))
        raise InputError(f"--remote: found {name!r}, expected one of {known} ({error})") from error
    except ImportError as error:
        raise InputError(f"remote {name}: {error}") from error


def owners(outs: list[Output], listings: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """The paths that need each object of dvc.lock. A folder's files are known if some list of it is whole."""
    paths: dict[str, list[str]] = {}
    for out in outs:
        if out.use_cache and out.hash_info:
            paths.setdefault(out.hash_info.value, []).append(out.def_path)
            for path, oid in listings.get(out.hash_info.value, {}).items():
                paths.setdefault(oid, []).append(f"{out.def_path}/{path}")
    return paths


def report(contents: Contents, needed: Mapping[str, list[str]], remove: bool) -> int:
    """Print the faults of one place, and remove them if asked to; returns how many there are."""
    label, odb, faults = contents.label, contents.odb, contents.faults
    heal = "`dvc push` brings it from the cache"
    if label == CACHE:
        heal = "`dvc fetch` brings it from the remote, `dvc repro` makes it anew"

    def say(oid: str, what: str) -> None:
        print(f"{label}: {odb.oid_to_path(oid)} {in_brackets(needed.get(oid, []))}: {what}")

    for oid, reason in sorted(contents.unreadable.items()):
        say(oid, f"cannot be read ({reason})")
    for oid, fault in sorted(faults.items()):
        if remove:
            odb.delete(oid)
        say(oid, f"{fault}; {f'removed, {heal}' if remove else '`--remove` removes it'}")
    there = contents.whole | faults.keys() | contents.unreadable.keys()
    missing = [oid for oid in needed if oid not in there]
    for oid in missing:
        say(oid, f"missing; {heal}")
    print(
        f"{label}: {len(contents.whole):,} objects whole, {len(faults):,} at fault, {len(missing):,} missing "
        f"of {len(needed):,} that dvc.lock needs"
    )
    if contents.leftovers:
        for name in contents.leftovers if remove else ():
            odb.delete(name)
        print(
            f"{label}: {len(contents.leftovers):,} parts of objects that killed transfers left, which DVC "
            f"never reads; {'removed' if remove else '`--remove` removes them'}"
        )
    return len(faults) + len(contents.unreadable) + len(missing)


def in_brackets(paths: list[str]) -> str:
    """The paths that need an object."""
    if not paths:
        return "(not of this dvc.lock)"
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"({', '.join(paths[:NAMED])}{more})"


def workspace(outs: list[Output], listings: dict[str, dict[str, str]]) -> Iterator[str]:
    """What is not as dvc.lock has it.

    The lists of folders that are as they should be join `listings`: they tell what a damaged object belongs
    to.
    """
    for out in tqdm(outs, desc="workspace", unit="out"):
        path, expected = Path(out.fs_path), out.hash_info.value if out.hash_info else None
        force = " --force" if path.exists() else ""
        command = f"dvc checkout{force}" if out.use_cache else "git checkout HEAD"
        back = f"`{command} {out.def_path}` brings it back"
        if expected is None:
            yield f"{out.def_path}: not in dvc.lock; `dvc repro {out.stage.addressing}` makes it"
        elif not path.exists():
            yield f"{out.def_path}: missing; {back}"
        elif path.is_file() and (md5 := dvc_lock.md5(path)) != expected:
            yield f"{out.def_path}: its md5 is {md5}, dvc.lock says {expected}; {back}"
        elif path.is_dir():
            files = dvc_lock.files_of(path)
            if dvc_lock.of_folder(files) == expected:
                listings[expected] = files
            else:
                yield f"{out.def_path}: {unlike_files(files, listings.get(expected, {}))}; {back}"


def unlike_files(files: Mapping[str, str], listing: Mapping[str, str]) -> str:
    """How many of a folder's files differ from its list, and the first of them."""
    unlike = sorted(name for name in files.keys() | listing.keys() if files.get(name) != listing.get(name))
    more = ", ..." if len(unlike) > NAMED else ""
    verb = "is" if len(unlike) == 1 else "are"
    return f"{len(unlike):,} of its files {verb} not as dvc.lock says ({', '.join(unlike[:NAMED])}{more})"


def changed_sources(repo: Repo) -> int:
    """Print which local sources are not what was fetched of them; returns how many changed.

    One that is not here is no fault: whoever pulled a colleague's run has what was fetched of it.
    """
    changed = 0
    for stage, path, pinned in sorted(local_sources(repo)):
        file = Path(repo.root_dir, path)
        if not file.exists():
            print(f"source {path}: not here; {stage} fetched it, and needs it again only if it reruns")
        elif (digest := local_sha256(file)) != pinned:
            changed += 1
            print(
                f"source {path}: its sha256 is {digest}, {stage} fetched {pinned}; put the new one into "
                "params.yaml and `dvc repro` fetches it, or put the old content back"
            )
    return changed


def local_sources(repo: Repo) -> set[tuple[str, str, str]]:
    """Stage, path and sha256 of each local source, as it was fetched."""
    fetching = [stage for stage in repo.index.stages if stage.addressing.startswith("fetch_")]
    return {
        (stage.addressing, source["path"], source["sha256"])
        for stage in fetching
        for dep in stage.deps
        if isinstance(dep, ParamsDependency) and dep.hash_info
        for source in sources_in(dep.hash_info.value)
        if source["kind"] == "local"
    }
