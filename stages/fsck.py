"""Check what DVC trusts: the objects of its cache, and of a remote, against their names, and the workspace against dvc.lock.

    python -m stages.fsck [--remote NAME] [--remove]

An object is named by the md5 of its content. DVC takes a write-protected one in the cache to be whole, and hands a damaged one out as it is. On a remote it takes what is there to be
whole, and of a folder whose list is there it takes every file to be there. Here every object is read, with `--remote` those of the remote as well.

Nothing is changed, but for `--remove`, which removes objects at fault where they lie, so that DVC sees that they are missing: `dvc fetch` brings those of the cache back from the
remote, `dvc push` those of the remote from the cache, and `dvc repro` makes them anew. It also removes the parts of objects that killed transfers left, which DVC never reads; do not
remove while another process pushes there or pulls. Ends with exit code 1 if something is wrong.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dvc.config import ConfigError
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc_data.hashfile.db import HashFileDB
from tqdm import tqdm

from stages import InputError, command, first_line, provenance

CACHE = "cache"
OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
BLOCK = 2**22
THREADS = 8
"""Objects that are read at once."""


Content = tuple[str, bytes | None] | Exception
"""Of an object the md5 of its content, and the content itself if it is a folder's list; or why it cannot be read."""


@dataclass
class Contents:
    """What lies in the cache, or on a remote."""

    label: str
    odb: HashFileDB
    whole: set[str] = field(default_factory=set)
    faults: dict[str, str] = field(default_factory=dict)
    """By name, what is wrong with an object."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """By name, why an object cannot be read."""
    leftovers: list[str] = field(default_factory=list)
    """Names of what killed transfers left."""
    listings: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of each folder whose list is whole, by path in it the object of each file."""

    def add(self, oid: str, content: Content) -> None:
        if isinstance(content, Exception):
            self.unreadable[oid] = first_line(content)
            return
        md5, listing = content
        if md5 != oid.removesuffix(".dir"):
            self.faults[oid] = f"damaged, the md5 of its content is {md5}"
            return
        self.whole.add(oid)
        if listing is not None:
            self.listings[oid] = {entry["relpath"]: entry["md5"] for entry in json.loads(listing)}

    def blame_incomplete_folders(self) -> None:
        """A push skips every file of a folder whose list lies on the remote, so what is missing would stay so."""
        for oid, files in self.listings.items():
            absent = [path for path, file in files.items() if file not in self.whole]
            if absent:
                self.whole.remove(oid)
                self.faults[oid] = f"list of a folder that is not whole, {len(absent):,} of its {len(files):,} files missing or damaged ({absent[0]}), which `dvc push` skips while the list is there"


def contents(label: str, odb: HashFileDB) -> Contents:
    """Reads every object.

    Raises:
        InputError: they cannot be listed.
    """
    found = Contents(label, odb)
    try:
        names = sorted(set(odb.all()))
    # each kind of remote has errors of its own
    except Exception as error:
        raise InputError(f"{label}: {odb.fs.unstrip_protocol(odb.path)} cannot be listed ({first_line(error)}); check the network, its URL and your credentials") from error
    oids = [name for name in names if OBJECT.fullmatch(name)]
    found.leftovers = [name for name in names if not OBJECT.fullmatch(name)]
    with tqdm(desc=f"{label}: reading {len(oids):,} objects", unit="B", unit_scale=True) as bar, ThreadPoolExecutor(THREADS) as pool:
        for oid, content in zip(oids, pool.map(lambda oid: read(odb, oid, bar), oids), strict=True):
            found.add(oid, content)
    return found


def read(odb: HashFileDB, oid: str, bar: tqdm) -> Content:
    """An object, from its first byte to its last."""
    md5, listing, path = hashlib.md5(usedforsecurity=False), bytearray(), odb.oid_to_path(oid)
    try:
        with odb.fs.open(path, "rb") as file:
            while block := file.read(BLOCK):
                md5.update(block)
                bar.update(len(block))
                if oid.endswith(".dir"):
                    listing += block
    # each kind of remote has errors of its own; what cannot be read is a fault like others, but is not removed
    except Exception as error:
        return error
    return md5.hexdigest(), bytes(listing) if oid.endswith(".dir") else None


def owners(outs: list[Output], listings: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Of each object that dvc.lock needs, the paths that it belongs to. What a folder needs is known if some list of it is whole."""
    found: dict[str, list[str]] = {}
    for out in outs:
        if out.use_cache and out.hash_info:
            found.setdefault(out.hash_info.value, []).append(out.def_path)
            for path, oid in listings.get(out.hash_info.value, {}).items():
                found.setdefault(oid, []).append(f"{out.def_path}/{path}")
    return found


def of(paths: list[str]) -> str:
    """Whose object it is, in brackets."""
    if not paths:
        return "(not of this dvc.lock)"
    return f"({', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''})"


def report(found: Contents, needed: Mapping[str, list[str]], remove: bool) -> int:
    """Prints what is wrong in the cache or on a remote, and removes it if asked to; how much it is."""
    heal = "`dvc fetch` brings it from the remote, `dvc repro` makes it anew" if found.label == CACHE else "`dvc push` brings it from the cache"
    for oid, fault in sorted(found.unreadable.items()):
        print(f"{found.label}: {found.odb.oid_to_path(oid)} {of(needed.get(oid, []))}: cannot be read ({fault})")
    for oid, fault in sorted(found.faults.items()):
        if remove:
            found.odb.delete(oid)
        print(f"{found.label}: {found.odb.oid_to_path(oid)} {of(needed.get(oid, []))}: {fault}; {f'removed, {heal}' if remove else '`--remove` removes it'}")
    missing = [oid for oid in needed if oid not in found.whole | found.faults.keys() | found.unreadable.keys()]
    for oid in missing:
        print(f"{found.label}: {found.odb.oid_to_path(oid)} {of(needed[oid])}: missing; {heal}")
    print(f"{found.label}: {len(found.whole):,} objects whole, {len(found.faults):,} at fault, {len(missing):,} missing of {len(needed):,} that dvc.lock needs")
    if found.leftovers:
        for name in found.leftovers if remove else ():
            found.odb.delete(name)
        print(f"{found.label}: {len(found.leftovers):,} parts of objects that killed transfers left, which DVC never reads; {'removed' if remove else '`--remove` removes them'}")
    return len(found.faults) + len(found.unreadable) + len(missing)


def workspace(outs: list[Output], listings: dict[str, dict[str, str]]) -> Iterator[str]:
    """What is not as dvc.lock has it. The lists of folders that are join the others: they tell what their objects are, where those in the cache are damaged."""
    for out in tqdm(outs, desc="workspace", unit="out"):
        path, expected = Path(out.fs_path), out.hash_info.value if out.hash_info else None
        tool = f"{'dvc' if out.use_cache else 'git'} checkout"
        back = f"`{tool}{' --force' if out.use_cache and path.exists() else ''} {out.def_path}` brings it back"
        if expected is None:
            yield f"{out.def_path}: not in dvc.lock; `dvc repro {out.stage.addressing}` makes it"
        elif not path.exists():
            yield f"{out.def_path}: missing; {back}"
        elif path.is_file() and (md5 := provenance.md5(path)) != expected:
            yield f"{out.def_path}: its md5 is {md5}, dvc.lock says {expected}; {back}"
        elif path.is_dir():
            files = {file.relative_to(path).as_posix(): provenance.md5(file) for file in path.rglob("*") if file.is_file()}
            if provenance.of_folder(files) == expected:
                listings[expected] = files
            else:
                listing = listings.get(expected, {})
                unlike = sorted(name for name in files.keys() | listing.keys() if files.get(name) != listing.get(name))
                yield f"{out.def_path}: {len(unlike):,} of its files {'is' if len(unlike) == 1 else 'are'} not as dvc.lock says ({', '.join(unlike[:3])}{', ...' if len(unlike) > 3 else ''}); {back}"


def run(remote: str | None, remove: bool) -> bool:
    """Print what is wrong; True if nothing is.

    Raises:
        InputError: there is no such remote, or it cannot be reached.
    """
    # DVC's own databases are not needed, and on a full disk they could not be opened
    with tempfile.TemporaryDirectory() as folder, Repo(config={"core": {"site_cache_dir": folder}}) as repo:
        outs = recorded(repo)
        places = [contents(CACHE, repo.cache.local)]
        if remote is not None:
            places.append(contents(f"remote {remote}", remote_objects(repo, remote)))
            places[-1].blame_incomplete_folders()
        listings = {oid: files for found in places for oid, files in found.listings.items()}
        unlike = list(workspace(outs, listings))
        needed = owners(outs, listings)
        wrong = sum(report(found, needed, remove) for found in places) + len(unlike)
        for line in unlike:
            print(f"workspace: {line}")
        print(f"workspace: {len(unlike):,} of {len(outs):,} outs are not as dvc.lock has them")
        for name, config in repo.config["remote"].items():
            # remotes that name another one have no default
            if not config.get("verify"):
                wrong += 1
                print(f"remote {name}: what is pulled from it is not checked; `dvc remote modify {name} verify true` has it checked")
    print("nothing is wrong" if wrong == 0 else f"{wrong:,} {'fault' if wrong == 1 else 'faults'}")
    return wrong == 0


def recorded(repo: Repo) -> list[Output]:
    """All outs, with what dvc.lock says of them."""
    try:
        return [out for stage in repo.index.stages for out in stage.outs]
    except DvcException as error:
        raise InputError(f"dvc.yaml or dvc.lock cannot be read ({first_line(error)}); `git checkout dvc.lock` brings the last one back, and `dvc repro` what was finished since, from the run cache") from error


def remote_objects(repo: Repo, name: str) -> HashFileDB:
    try:
        return repo.cloud.get_remote_odb(name, "fsck")
    except ConfigError as error:
        raise InputError(f"--remote: found {name!r}, expected one of {', '.join(sorted(repo.config['remote']))} ({error})") from error
    except ImportError as error:
        raise InputError(f"remote {name}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remote", metavar="NAME", help="check the objects of this DVC remote, too")
    parser.add_argument("--remove", action="store_true", help="remove objects at fault from the cache and, with --remote, from the remote")
    arguments = parser.parse_args()
    if not run(arguments.remote, arguments.remove):
        sys.exit(1)


if __name__ == "__main__":
    command(main)
