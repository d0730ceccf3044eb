"""Fetching with real pip from a folder of archives, and every way in which a source can be wrong."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile

import pytest

from reprotune.data.sources import fetched, local_sha256
from reprotune.errors import InputError
from reprotune.params import LocalSource, PypiSource


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add_wheel(index, files: dict[str, str], name: str = "some_rows") -> str:
    """Put a wheel into the index and return its sha256."""
    archive = index / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(archive, "w") as zipped:
        for path, content in {**files, **meta}.items():
            zipped.writestr(path, content)
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def source(digest: str, path: str = "rows/a.json", package: str = "some-rows") -> PypiSource:
    return PypiSource(kind="pypi", package=package, version="1.0", sha256=digest, path=path)


def test_a_package_is_read_and_not_installed(index):
    digest = add_wheel(index, {"rows/a.json": '[{"x": 1}]', "other.txt": "no"})
    with fetched(source(digest)) as path:
        assert json.loads(path.read_text()) == [{"x": 1}]
        assert not (path.parent.parent / "other.txt").exists()
    assert not path.exists()
    with pytest.raises(ImportError):
        __import__("some_rows")


def test_a_folder_of_a_package(index):
    digest = add_wheel(index, {"rows/a.json": "[]", "rows/deep/b.json": "[]", "rowsnot/c.json": "[]"})
    with fetched(source(digest, "rows")) as path:
        assert sorted(str(file.relative_to(path)) for file in path.rglob("*.json")) == [
            "a.json",
            "deep/b.json",
        ]


def test_an_sdist_is_taken_when_its_digest_is_given(index):
    add_wheel(index, {"rows/a.json": '["wheel"]'})
    archive = index / "some_rows-1.0.tar.gz"
    files = {
        "data/a.json": b'["sdist"]',
        "PKG-INFO": b"Metadata-Version: 2.1\nName: some-rows\nVersion: 1.0\n",
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": b"import pathlib\ndef prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        b"    info = pathlib.Path(folder) / 'some_rows-1.0.dist-info'\n    info.mkdir()\n"
        b"    (info / 'METADATA').write_text('Metadata-Version: 2.1\\nName: some-rows\\nVersion: 1.0\\n')\n"
        b"    return info.name\n"
        b"def build_wheel(*_, **__):\n    raise SystemExit('never built')\n",
    }
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"some_rows-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (index / "some_rows-1.0-py3-none-any.whl").unlink()
    with fetched(source(hashlib.sha256(archive.read_bytes()).hexdigest(), "data/a.json")) as path:
        assert path.read_text() == '["sdist"]'


def test_another_digest_is_refused_and_both_are_named(index):
    digest = add_wheel(index, {"rows/a.json": "[]"})
    with (
        pytest.raises(InputError, match=f"some-rows==1.0: sha256 is {digest}, expected {'0' * 64}"),
        fetched(source("0" * 64)),
    ):
        pass


def test_a_path_that_is_not_there(index):
    digest = add_wheel(index, {"rows/a.json": "[]"})
    with (
        pytest.raises(InputError, match=r"no file at 'rows/b\.json'; correct `path`"),
        fetched(source(digest, "rows/b.json")),
    ):
        pass


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(InputError, match=r"some-rows==1\.0: pip could not download it .*check the network"),
        fetched(source("0" * 64)),
    ):
        pass


def test_a_member_cannot_leave_the_folder(index, tmp_path):
    digest = add_wheel(index, {"rows/../../../escaped.json": "[]"})
    with pytest.raises(InputError, match="points outside the archive"), fetched(source(digest, "rows")):
        pass
    assert not list(tmp_path.rglob("escaped.json"))


def test_a_missing_local_file_is_named(tmp_path):
    with (
        pytest.raises(InputError, match=r"nowhere\.json: no such file or folder; correct `path`"),
        fetched(LocalSource(kind="local", path="nowhere.json", sha256="0" * 64)),
    ):
        pass


def test_a_changed_local_file_is_noticed(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "b.json").write_text("[1]")
    (folder / "a.json").write_text("[2]")
    listed = subprocess.check_output(["sha256sum", "a.json", "b.json"], cwd=folder, text=True)
    of_folder = hashlib.sha256(listed.encode()).hexdigest()
    assert local_sha256(folder / "a.json") == listed.split()[0]
    with fetched(LocalSource(kind="local", path=str(folder), sha256=of_folder)) as path:
        assert path == folder
    (folder / "a.json").write_text("[3]")
    changed = LocalSource(kind="local", path=str(folder), sha256=of_folder)
    expected = rf"rows: sha256 is [0-9a-f]{{64}}, expected {of_folder}; if it was meant to change"
    with pytest.raises(InputError, match=expected), fetched(changed):
        pass
