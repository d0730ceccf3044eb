"""fsck names every planted fault and removes nothing unasked; DVC restores what it removed."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reprotune.data.sources import local_sha256
from reprotune.dvc_lock import md5
from reprotune.errors import InputError
from reprotune.pipeline import fsck
from tests.clones import DVC, call, damage, own_copy


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder of the clone's remote."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def pushed(finished, shared, tmp_path_factory) -> Path:
    folder = own_copy(finished, tmp_path_factory.mktemp("fsck") / "clone")
    with (folder / ".dvc" / "config.local").open("a") as file:
        file.write(f"['remote \"shared\"']\n    url = {shared}\n")
    call(*DVC, "push", cwd=folder)
    return folder


@pytest.fixture
def clone(pushed, monkeypatch) -> Path:
    """A run without faults; each test leaves it without faults."""
    monkeypatch.chdir(pushed)
    return pushed


@pytest.fixture
def check(clone, capsys) -> Callable[..., list[str]]:
    """Runs fsck and returns the lines that it prints; the last one says whether something is wrong."""

    def lines(remote: str | None = "shared", remove: bool = False) -> list[str]:
        capsys.readouterr()
        whole = fsck.run(remote, remove)
        printed = capsys.readouterr().out.splitlines()
        assert whole == (printed[-1] == "nothing is wrong")
        return printed

    return lines


def object_of(store: Path, oid: str) -> Path:
    return store / "files" / "md5" / oid[:2] / oid[2:]


def state(*folders: Path) -> dict[Path, str]:
    return {file: md5(file) for folder in folders for file in folder.rglob("*") if file.is_file()}


def faults(lines: list[str]) -> list[str]:
    """The lines that name a fault."""
    return [
        line
        for line in lines
        if ": damaged, " in line
        or ": missing; " in line
        or ": list of a folder " in line
        or (line.startswith("workspace: ") and " outs are not " not in line)
    ]


def flip(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def cut(content: bytes) -> bytes:
    return content[:-1]


def test_a_whole_run_has_nothing_wrong(clone):
    result = call(sys.executable, "-m", "reprotune", "fsck", "--remote", "shared", cwd=clone)
    lines = result.stdout.splitlines()
    assert lines[-1] == "nothing is wrong"
    whole = " objects whole, 0 at fault, 0 missing of "
    assert any(line.startswith("cache: ") and whole in line for line in lines)
    assert any(line.startswith("remote shared: ") and whole in line for line in lines)


@pytest.mark.parametrize(
    ("path", "change", "owner", "heal"),
    [
        ("models/base/model.safetensors", flip, "models/base/model.safetensors", ["fetch"]),
        ("evals/dpo/gsm8k.parquet", cut, "evals/dpo/gsm8k.parquet", ["fetch"]),
        ("models/sft", flip, "models/sft", ["fetch"]),
        ("data/raw/benchmarks/gsm8k", cut, "data/raw/benchmarks/gsm8k", ["repro", "fetch_benchmark@gsm8k"]),
    ],
)
def test_a_damaged_object_of_the_cache(path, change, owner, heal, clone, shared, check):
    """The object of a file, of a file in a folder, or the list of a folder."""
    file = object_of(clone / ".dvc" / "cache", md5(clone / path))
    damage(file, change(file.read_bytes()))
    before = state(clone, shared)
    (line,) = faults(check())
    assert line.startswith(f"cache: {file} (") and owner in line
    assert f": damaged, the md5 of its content is {md5(file)}; " in line
    assert state(clone, shared) == before
    check(remove=True)
    del before[file]
    assert state(clone, shared) == before
    (line,) = faults(check())
    assert line.startswith(f"cache: {file} (") and owner in line
    assert ": missing; `dvc fetch` brings it from the remote" in line
    call(*DVC, *heal, cwd=clone)
    assert check()[-1] == "nothing is wrong"


def test_an_object_that_the_lock_names_is_missing(clone, check):
    """It is named even if the folder's list in the cache is damaged, since the workspace has the folder."""
    file, listing = (
        object_of(clone / ".dvc" / "cache", md5(clone / path))
        for path in ("models/sft/adapter_config.json", "models/sft")
    )
    file.unlink()
    damage(listing, cut(listing.read_bytes()))
    damaged, missing = faults(check(remote=None, remove=True))
    assert damaged.startswith(f"cache: {listing} (models/sft): damaged, ")
    assert missing.startswith(f"cache: {file} (") and "models/sft/adapter_config.json" in missing
    assert "): missing; `dvc fetch` brings it from the remote" in missing
    call(*DVC, "fetch", cwd=clone)
    assert check()[-1] == "nothing is wrong"


@pytest.mark.parametrize(
    ("path", "fault", "command"),
    [
        (
            "evals/dpo/gsm8k.parquet",
            "evals/dpo/gsm8k.parquet: its md5 is ",
            "dvc checkout --force evals/dpo/gsm8k.parquet",
        ),
        (
            "evals/dpo/gsm8k.parquet",
            "evals/dpo/gsm8k.parquet: missing; ",
            "dvc checkout evals/dpo/gsm8k.parquet",
        ),
        (
            "models/sft/adapter_config.json",
            "models/sft: 1 of its files is not as dvc.lock says (adapter_config.json); ",
            "dvc checkout --force models/sft",
        ),
        (
            "metrics/dpo/gsm8k.json",
            "metrics/dpo/gsm8k.json: its md5 is ",
            "git checkout HEAD metrics/dpo/gsm8k.json",
        ),
        (
            "metrics/dpo/gsm8k.json",
            "metrics/dpo/gsm8k.json: missing; ",
            "git checkout HEAD metrics/dpo/gsm8k.json",
        ),
    ],
)
def test_a_workspace_that_is_not_as_the_lock_says(path, fault, command, clone, check):
    file = clone / path
    content = file.read_bytes() + b"\n"
    file.unlink()
    if "missing" not in fault:
        file.write_bytes(content)
    before = state(clone)
    (line,) = faults(check())
    assert line.startswith(f"workspace: {fault}") and f"`{command}` brings it back" in line
    # `--remove` removes objects only
    assert faults(check(remove=True)) == [line] and state(clone) == before
    call(*(DVC if command.startswith("dvc") else ["git"]), *command.split()[1:], cwd=clone)
    assert check()[-1] == "nothing is wrong"


@pytest.mark.parametrize("what", ["damaged", "gone"])
def test_an_object_at_fault_on_a_remote(what, clone, shared, check):
    """`dvc push` restores the object of a file in a folder only if the folder's list is removed as well."""
    file, listing = (
        object_of(shared, md5(clone / path)) for path in ("models/base/model.safetensors", "models/base")
    )
    if what == "damaged":
        damage(file, flip(file.read_bytes()))
    else:
        file.unlink()
    assert "Everything is up to date." in call(*DVC, "push", cwd=clone).stdout
    assert check(remote=None)[-1] == "nothing is wrong"
    before = state(clone, shared)
    lines = sorted(faults(check()), key=lambda line: "list of a folder" in line)
    assert len(lines) == 2 and all(line.startswith("remote shared: ") for line in lines)
    assert f"{file} (models/base/model.safetensors): " in lines[0]
    assert ("damaged, " if what == "damaged" else "missing; `dvc push`") in lines[0]
    assert (
        f"{listing} (models/base): list of a folder with "
        "1 of its 6 files missing or damaged (model.safetensors)" in lines[1]
    )
    assert state(clone, shared) == before
    check(remove=True)
    kept = {path: content for path, content in before.items() if path not in (file, listing)}
    assert state(clone, shared) == kept
    assert call(*DVC, "push", cwd=clone).stdout.strip() == "2 files pushed"
    assert check()[-1] == "nothing is wrong"


def test_what_cannot_be_read_is_named_and_left_alone(clone, check):
    """Everything else is still checked."""
    file = object_of(clone / ".dvc" / "cache", md5(clone / "evals" / "dpo" / "gsm8k.parquet"))
    content = file.read_bytes()
    file.unlink()
    file.symlink_to("nowhere")
    try:
        lines = check(remote=None, remove=True)
        assert file.is_symlink()
    finally:
        file.unlink()
        file.write_bytes(content)
        file.chmod(0o444)
    (line,) = [line for line in lines if str(file) in line]
    assert "evals/dpo/gsm8k.parquet): cannot be read (FileNotFoundError: " in line and lines[-1] == "1 fault"
    assert any(line.startswith("workspace: 0 of ") for line in lines)


def test_what_a_killed_transfer_left_is_no_fault(clone, shared, check):
    left = [store / "files" / "md5" / "ab" / ".aRbX-8kq.tmp" for store in (clone / ".dvc" / "cache", shared)]
    for file in left:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
    lines = check()
    assert lines[-1] == "nothing is wrong"
    note = " parts of objects that killed transfers left, which DVC never reads; `--remove` removes them"
    assert sum(note in line for line in lines) == 2
    check(remove=True)
    assert not any(file.exists() for file in left)


def test_an_object_of_another_commit_is_checked_too(clone, shared, check):
    file = object_of(shared, "0123456789abcdef0123456789abcdef")
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"of another name")
    result = call(sys.executable, "-m", "reprotune", "fsck", "--remote", "shared", cwd=clone, check=False)
    assert result.returncode == 1
    assert f"{file} (not of this dvc.lock): damaged, " in result.stdout
    assert result.stdout.splitlines()[-1] == "1 fault"
    check(remove=True)
    assert check()[-1] == "nothing is wrong"


def test_a_remote_that_cannot_be_checked_is_said_so(clone, check):
    """A remote without `verify` is named as well: its pulls are not checked."""
    config = clone / ".dvc" / "config.local"
    before = config.read_text()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        config.write_text(
            f"{before}"
            f"['remote \"silent\"']\n    url = ssh://127.0.0.1:{port}/storage\n    verify = true\n"
            "['remote \"cloud\"']\n    url = gs://bucket\n    verify = true\n"
            "['remote \"trusting\"']\n    url = /nowhere\n"
        )
        refused = (
            r"^remote silent: ssh://127.0.0.1:\d+/storage/files/md5 cannot be listed "
            r"\(ConnectionRefusedError: .*; check the network, its URL and your credentials"
        )
        with pytest.raises(InputError, match=refused):
            check("silent")
    with pytest.raises(
        InputError, match=r"^--remote: found 'nowhere', expected one of cloud, shared, silent, trusting "
    ):
        check("nowhere")
    with pytest.raises(
        InputError, match=r"^remote cloud: gs is supported, but requires 'dvc-gs' to be installed"
    ):
        check("cloud")
    lines = check()
    assert lines[-2:] == [
        "remote trusting: pulled objects are not checked; "
        "`dvc remote modify trusting verify true` checks them",
        "1 fault",
    ]
    config.write_text(before)
    assert check()[-1] == "nothing is wrong"


def test_what_has_not_run_is_named(clone, check):
    lock = clone / "dvc.lock"
    before = lock.read_text()
    lock.unlink()
    lines = check(remote=None)
    assert "workspace: models/dpo: not in dvc.lock; `dvc repro dpo` makes it" in lines
    lock.write_text(before)
    assert check()[-1] == "nothing is wrong"


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("tiny/alpaca.json", "fetch_sft_data@rows"),
        ("tiny/model", "fetch_model"),
        ("tiny/benchmarks/gsm8k", "fetch_benchmark@gsm8k"),
    ],
)
def test_a_local_source_that_is_not_what_was_fetched(name, stage, clone, check):
    """DVC does not look at it again; a clone of somebody else may not have it."""
    source = clone / name
    assert "Data and pipelines are up to date." in call(*DVC, "status", cwd=clone).stdout
    before = local_sha256(source)
    file = source if source.is_file() else next(iter(sorted(source.iterdir())))
    content = file.read_bytes()
    file.write_bytes(content + b"\n")
    try:
        assert "Data and pipelines are up to date." in call(*DVC, "status", cwd=clone).stdout
        lines = check()
        (line,) = [line for line in lines if line.startswith("source ")]
        now = local_sha256(source)
        assert line.startswith(
            f"source {name}: its sha256 is {now}, {stage} fetched {before}; put the new one"
        )
        assert lines[-1] == "1 fault"
        source.rename(clone / "elsewhere")
        lines = check()
        (line,) = [line for line in lines if line.startswith("source ")]
        assert line.startswith(f"source {name}: not here; {stage} fetched it")
        assert lines[-1] == "nothing is wrong"
        (clone / "elsewhere").rename(source)
    finally:
        file.write_bytes(content)
    assert not [line for line in check() if line.startswith("source ")]
