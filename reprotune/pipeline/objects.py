"""The objects of DVC's cache or of a remote, each read from its first byte to its last.

An object is named by the md5 of its content; that of a folder is the list of its files.
"""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from dvc_data.hashfile.db import HashFileDB
from tqdm import tqdm

from reprotune.errors import InputError, first_line

OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?")
BLOCK = 2**22
"""Bytes that are read at once."""
THREADS = 8
"""Objects that are read at once."""

Content = tuple[str, bytes | None] | Exception
"""The md5 of an object's content, with the content if it lists a folder; or why it cannot be read."""


@dataclass
class Contents:
    """The objects of one place."""

    label: str
    odb: HashFileDB
    whole: set[str] = field(default_factory=set)
    """Names of the objects whose content has the md5 that they are named by."""
    faults: dict[str, str] = field(default_factory=dict)
    """What is wrong with an object, by its name."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why an object cannot be read, by its name."""
    leftovers: list[str] = field(default_factory=list)
    """Names of parts of objects that killed transfers left; DVC never reads them."""
    listings: dict[str, dict[str, str]] = field(default_factory=dict)
    """The object of each file of a folder, by the folder's object and the file's path in it."""

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
        """Count the list of a folder with missing files as a fault: it keeps `dvc push` from sending them."""
        for oid, files in self.listings.items():
            absent = [path for path, file in files.items() if file not in self.whole]
            if absent:
                self.whole.remove(oid)
                self.faults[oid] = (
                    f"list of a folder with {len(absent):,} of its {len(files):,} files missing or damaged "
                    f"({absent[0]}), and `dvc push` skips them while the list is there"
                )


def read_all(label: str, odb: HashFileDB) -> Contents:
    """Read every object of a place.

    Raises:
        InputError: its objects cannot be listed.
    """
    contents = Contents(label, odb)
    try:
        names = sorted(set(odb.all()))
    # each kind of remote has errors of its own
    except Exception as error:
        raise InputError(
            f"{label}: {odb.fs.unstrip_protocol(odb.path)} cannot be listed ({first_line(error)}); "
            "check the network, its URL and your credentials"
        ) from error
    oids = [name for name in names if OBJECT.fullmatch(name)]
    contents.leftovers = [name for name in names if not OBJECT.fullmatch(name)]
    with (
        tqdm(desc=f"{label}: reading {len(oids):,} objects", unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for oid, content in zip(oids, pool.map(lambda oid: read(odb, oid, bar), oids), strict=True):
            contents.add(oid, content)
    return contents


def read(odb: HashFileDB, oid: str, bar: tqdm) -> Content:
    md5, listing = hashlib.md5(usedforsecurity=False), bytearray()
    try:
        with odb.fs.open(odb.oid_to_path(oid), "rb") as file:
            while block := file.read(BLOCK):
                md5.update(block)
                bar.update(len(block))
                if oid.endswith(".dir"):
                    listing += block
    # each kind of remote has errors of its own; an unreadable object is a fault that is not removed
    except Exception as error:
        return error
    return md5.hexdigest(), bytes(listing) if oid.endswith(".dir") else None
