"""DVC remotes and their faults: a local folder, S3 (rclone) and SSH (OpenSSH), the servers on loopback."""

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from reprotune.dvc_lock import md5
from reprotune.pipeline.objects import OBJECT
from reprotune.process import die_with_parent
from tests import tiny
from tests.clones import DVC, ENVIRONMENT, call, damage, own_copy, small_disk

pytestmark = pytest.mark.slow

SSHD = Path("/usr/sbin/sshd")
UP_TO_DATE = "Data and pipelines are up to date."


@dataclass(frozen=True)
class Storage:
    """Where a remote keeps its objects, and how it is reached."""

    kind: str
    folder: Path
    """Its path on the server."""
    url: str
    settings: dict[str, str] = field(default_factory=dict)
    """Settings in .dvc/config.local, without the URL."""
    refused: dict[str, str] = field(default_factory=dict)
    """Settings with credentials that the server refuses."""
    closed: dict[str, str] = field(default_factory=dict)
    """Settings with a port where nothing listens."""

    def within(self, name: str) -> "Storage":
        return replace(self, folder=self.folder / name, url=f"{self.url}/{name}")

    def objects(self) -> dict[str, Path]:
        """The file of each object by its md5. Half-written objects have other names."""
        folder = self.folder / "files" / "md5"
        return {file.parent.name + file.name: file for file in folder.rglob("*") if file.is_file()}

    def used_by(self, clone: Path, **settings: str) -> Path:
        """Make this the remote of the clone, with settings that git ignores."""
        settings = {"url": self.url, **self.settings, **settings}
        lines = [f"    {key} = {value}\n" for key, value in settings.items()]
        (clone / ".dvc" / "config.local").write_text("['remote \"shared\"']\n" + "".join(lines))
        return clone


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(command: list[str], port: int, log: Path) -> subprocess.Popen:
    """Start a server that ends with this process, and return once it listens."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with_parent, signal.SIGKILL),
        )
    deadline = time.monotonic() + 20
    while True:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return process
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def end(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(timeout=20)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Storage:
    folder = tmp_path_factory.mktemp("local")
    return Storage("local", folder, str(folder))


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[Storage]:
    root, port, secret = tmp_path_factory.mktemp("s3"), free_port(), secrets.token_hex(8)
    (root / "bucket").mkdir()
    # short, as tests change the files directly; at 0 the server mostly rebuilds its cache
    options = [
        "--dir-cache-time",
        "100ms",
        "--config",
        str(root / "none.conf"),
        "--auth-key",
        f"team,{secret}",
        "--addr",
        f"127.0.0.1:{port}",
    ]
    process = serve(
        [str(Path(sys.executable).with_name("rclone")), "serve", "s3", *options, str(root)],
        port,
        root.with_suffix(".log"),
    )
    settings = {
        "endpointurl": f"http://127.0.0.1:{port}",
        "access_key_id": "team",
        "secret_access_key": secret,
        "region": "us-east-1",
    }
    yield Storage(
        "s3",
        root / "bucket",
        "s3://bucket",
        settings,
        {"secret_access_key": "wrong"},
        {"endpointurl": f"http://127.0.0.1:{free_port()}"},
    )
    end(process)


@pytest.fixture(scope="module")
def ssh(tmp_path_factory) -> Iterator[Storage]:
    if not SSHD.exists():
        pytest.skip(f"{SSHD} is not there; Debian's openssh-server has it")
    root, port = tmp_path_factory.mktemp("ssh"), free_port()
    for name in ("host", "authorized", "other"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name), cwd=root)
    if os.getuid() == 0:
        # the privilege separation directory of sshd
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    lines = [
        "ListenAddress 127.0.0.1",
        f"Port {port}",
        f"HostKey {root}/host",
        "PidFile none",
        f"AuthorizedKeysFile {root}/authorized.pub",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PermitRootLogin yes",
        "Subsystem sftp internal-sftp",
    ]
    (root / "sshd_config").write_text("\n".join(lines) + "\n")
    process = serve([str(SSHD), "-D", "-e", "-f", str(root / "sshd_config")], port, root.with_suffix(".log"))
    settings = {"user": getpass.getuser(), "port": str(port), "keyfile": str(root / "authorized")}
    yield Storage(
        "ssh",
        root / "storage",
        f"ssh://127.0.0.1{root}/storage",
        settings,
        {"keyfile": str(root / "other")},
        {"port": str(free_port())},
    )
    end(process)


@pytest.fixture(scope="module", params=["local", "s3", "ssh"])
def storage(request) -> Storage:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def first(finished, tmp_path_factory) -> Path:
    return own_copy(finished, tmp_path_factory.mktemp("run") / "first")


@pytest.fixture(scope="module")
def pushed(storage, first) -> tuple[Path, Storage]:
    """A finished run, pushed."""
    run = storage.within("run")
    assert "files pushed" in call(*DVC, "push", cwd=run.used_by(first)).stdout
    return first, run


def tried(clone: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a command that may fail, but must end and print no traceback."""
    # the S3 client waits before each retry
    environment = ENVIRONMENT | {"AWS_MAX_ATTEMPTS": "1"}
    result = subprocess.run(
        command,
        cwd=clone,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    assert "Traceback" not in result.stdout, result.stdout
    return result


def dvc(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    return tried(clone, *DVC, *arguments)


def fsck(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    return tried(clone, sys.executable, "-m", "reprotune", "fsck", *arguments)


def second_clone(clone: Path, folder: Path) -> Path:
    call("git", "clone", "-q", str(clone), str(folder), cwd=clone)
    return folder


def make_small(folder: Path, size_one: int = 1000, size_two: int = 1000) -> Path:
    """A repository with a folder of two random files, `one` and `two`, in its cache. Sizes are in bytes."""
    shutil.copytree(
        tiny.ROOT / "reprotune", folder / "reprotune", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / ".dvc").mkdir()
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore"):
        (folder / name).write_bytes((tiny.ROOT / name).read_bytes())
    (folder / "data").mkdir()
    for name, size in (("one", size_one), ("two", size_two)):
        (folder / "data" / name).write_bytes(os.urandom(size))
    call("git", "init", "-q", cwd=folder)
    call(*DVC, "add", "-q", "data", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "data", cwd=folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_second_clone_pulls_and_is_up_to_date(pushed, tmp_path):
    clone, storage = pushed
    second = storage.used_by(second_clone(clone, tmp_path / "second"))
    assert not (second / "models").exists()
    assert dvc(second, "pull").returncode == 0
    assert UP_TO_DATE in dvc(second, "repro").stdout
    # neither the URL nor a secret is in a file that git sees
    for folder in (clone, second):
        assert call("git", "status", "--porcelain", cwd=folder).stdout == ""


def test_what_is_damaged_on_a_remote_is_noticed_named_and_healed(pushed, tmp_path):
    """One object has a flipped byte and one is cut short: a pull fails and leaves no damaged file."""
    clone, storage = pushed
    flipped, cut = (
        md5(clone / "models" / "base" / "model.safetensors"),
        md5(clone / "evals" / "dpo" / "gsm8k.parquet"),
    )
    objects = storage.objects()
    content = objects[flipped].read_bytes()
    damage(objects[flipped], content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    damage(objects[cut], objects[cut].read_bytes()[:-1])
    time.sleep(0.2)

    second = storage.used_by(second_clone(clone, tmp_path / "second"))
    result = dvc(second, "pull")
    assert result.returncode != 0 and "Checkout failed for following targets:" in result.stdout
    assert {"models/base", "evals/dpo/gsm8k.parquet"} <= set(result.stdout.split())
    assert not (second / "models" / "base").exists()
    assert not (second / "evals" / "dpo" / "gsm8k.parquet").exists()
    result = fsck(second, "--remote", "shared")
    assert result.returncode == 1, result.stdout
    missing = r"(?m)^cache: \d+ objects whole, 0 at fault, 2 missing"
    assert re.search(missing, result.stdout), result.stdout
    lines = [
        line
        for line in result.stdout.splitlines()
        if line.startswith("remote shared: ") and "): damaged, the md5 of its content is " in line
    ]
    assert len(lines) == 2, lines
    for path in ("(models/base/model.safetensors)", "evals/dpo/gsm8k.parquet"):
        assert any(path in line for line in lines), lines

    printed = fsck(clone, "--remote", "shared", "--remove").stdout
    assert "; removed, `dvc push` brings it from the cache" in printed
    assert "files pushed" in dvc(clone, "push").stdout
    assert dvc(second, "pull").returncode == 0
    assert "nothing is wrong" in fsck(second, "--remote", "shared").stdout


def test_a_push_killed_midway_loses_nothing(storage, tmp_path):
    """A half-written object has another name than a whole one, and the next push ignores it."""
    storage = storage.within("killed")
    clone = storage.used_by(make_small(tmp_path / "first", size_one=120 * 2**20))
    process = subprocess.Popen(
        [*DVC, "push"], cwd=clone, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    largest = 0
    while process.poll() is None and largest < 2**20:
        # a file may be renamed in between
        with suppress(FileNotFoundError):
            largest = max((file.stat().st_size for file in storage.objects().values()), default=0)
        time.sleep(0.001)
    process.kill()
    process.wait(timeout=20)
    assert process.returncode == -signal.SIGKILL
    left = storage.objects()
    assert len(left) < 3
    assert any(not OBJECT.fullmatch(name) for name in left), left
    assert all(md5(file) == name for name, file in left.items() if OBJECT.fullmatch(name)), left

    assert "files pushed" in dvc(clone, "push").stdout
    second = storage.used_by(second_clone(clone, tmp_path / "second"))
    assert dvc(second, "pull").returncode == 0
    assert files_of(second / "data") == files_of(clone / "data")
    assert fsck(second, "--remote", "shared").returncode == 0
    assert fsck(second, "--remote", "shared", "--remove").returncode == 0
    # rclone lists no unfinished upload, and removes its parts itself
    assert storage.kind == "s3" or len(storage.objects()) == 3


@pytest.mark.parametrize("what", ["refused", "closed"])
@pytest.mark.parametrize("kind", ["s3", "ssh"])
def test_a_remote_that_cannot_be_used_is_said_so(kind, what, request, tmp_path):
    """Wrong credentials or nothing that listens: a clear message, nothing written, and a retry succeeds."""
    storage = request.getfixturevalue(kind).within(what)
    expected = {
        ("s3", "refused"): "An error occurred (403) when calling the HeadObject operation: Forbidden",
        ("s3", "closed"): 'Could not connect to the endpoint URL: "http://127.0.0.1:',
        ("ssh", "refused"): f"Permission denied for user {getpass.getuser()} on host 127.0.0.1",
        ("ssh", "closed"): "Connect call failed ('127.0.0.1', ",
    }[kind, what]
    clone = make_small(tmp_path / "first")
    wrong = getattr(storage, what)
    result = dvc(storage.used_by(clone, **wrong), "push")
    assert result.returncode != 0 and expected in result.stdout, result.stdout
    assert not storage.objects()
    result = fsck(clone, "--remote", "shared")
    assert result.returncode == 1, result.stdout
    assert "error: remote shared: " in result.stdout and " cannot be listed (" in result.stdout, result.stdout
    assert dvc(storage.used_by(clone), "push").returncode == 0

    second = second_clone(clone, tmp_path / "second")
    result = dvc(storage.used_by(second, **wrong), "pull")
    assert result.returncode != 0, result.stdout
    assert f"failed to connect to {kind}" in result.stdout and expected in result.stdout, result.stdout
    assert not (second / "data").exists() and not files_of(second / ".dvc" / "cache")
    assert dvc(storage.used_by(second), "pull").returncode == 0
    assert files_of(second / "data") == files_of(clone / "data")


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["s3", "ssh"])
def test_a_host_that_never_answers_is_given_up(kind, request, tmp_path):
    """After the timeout set for the remote; the default takes minutes."""
    storage = request.getfixturevalue(kind).within("silent")
    clone = make_small(tmp_path / "clone")
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        # with a full queue, Linux drops further connections
        listener.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        settings = {
            "s3": {"endpointurl": f"http://127.0.0.1:{port}", "connect_timeout": "3"},
            "ssh": {"port": str(port), "timeout": "3"},
        }[kind]
        began = time.monotonic()
        result = dvc(storage.used_by(clone, **settings), "push")
        assert result.returncode != 0 and time.monotonic() - began < 100, result.stdout
        assert kind == "ssh" or "Connect timeout on endpoint URL" in result.stdout, result.stdout
    assert dvc(storage.used_by(clone), "push").returncode == 0


def test_a_folder_that_is_not_there_is_said_so(local, tmp_path):
    """For example on a disk that is not mounted."""
    storage = local.within("unmounted")
    clone = storage.used_by(make_small(tmp_path / "first"))
    result = dvc(storage.used_by(second_clone(clone, tmp_path / "second")), "pull")
    assert result.returncode != 0, result.stdout
    message = "Some of the cache files do not exist neither locally nor on remote"
    assert message in result.stdout, result.stdout


def test_a_full_disk_leaves_nothing_that_is_taken_to_be_whole(storage, tmp_path):
    """The same pull succeeds once there is room."""
    storage, disk = storage.within("full"), tmp_path / "disk"
    clone = storage.used_by(make_small(tmp_path / "first", 6 * 2**20, 6 * 2**20))
    call(*DVC, "push", cwd=clone)
    with small_disk(disk, 8):
        second = storage.used_by(second_clone(clone, disk / "second"))
        result = dvc(second, "pull")
        assert result.returncode != 0 and "[Errno 28] No space left on device" in result.stdout, result.stdout
        assert not (second / "data").exists()
        # DVC checks the md5 of a writable file in its cache before it uses it
        for file in (second / ".dvc" / "cache" / "files" / "md5").rglob("*"):
            assert file.is_dir() or file.stat().st_mode & 0o222 or md5(file) == file.parent.name + file.name
        assert fsck(second, "--remove").returncode == 1
        assert not [name for name in files_of(second / ".dvc" / "cache") if name.endswith(".tmp")]
        call("mount", "-o", "remount,size=64m", str(disk), cwd=tmp_path)
        assert dvc(second, "pull").returncode == 0
        assert files_of(second / "data") == files_of(clone / "data")
        assert "nothing is wrong" in fsck(second).stdout


def test_it_is_verify_that_notices(local, tmp_path):
    """Without `verify`, DVC pulls damaged files and calls them clean; fsck names the remote and the files."""
    storage = local.within("unverified")
    clone = storage.used_by(make_small(tmp_path / "first"))
    call(*DVC, "push", cwd=clone)
    damage(storage.objects()[md5(clone / "data" / "one")], bytes(1000))
    second = storage.used_by(second_clone(clone, tmp_path / "second"), verify="false")
    assert dvc(second, "pull").returncode == 0 and UP_TO_DATE in dvc(second, "status").stdout
    assert (second / "data" / "one").read_bytes() == bytes(1000)
    result = fsck(second)
    assert result.returncode == 1 and "(data/one): damaged, " in result.stdout
    assert "workspace: data: 1 of its files is not as dvc.lock says (one)" in result.stdout
    assert (
        "remote shared: pulled objects are not checked; "
        "`dvc remote modify shared verify true` checks them" in result.stdout
    )


def test_a_damaged_list_of_a_folder_is_noticed(local, tmp_path):
    """DVC pulls by a damaged list that is still valid JSON, even with `verify`.

    `dvc status` and fsck show the result.
    """
    storage = local.within("list")
    clone = storage.used_by(make_small(tmp_path / "first"))
    call(*DVC, "push", cwd=clone)
    (listing,) = (file for name, file in storage.objects().items() if name.endswith(".dir"))
    damage(listing, listing.read_bytes().replace(b'"one"', b'"onf"'))
    second = storage.used_by(second_clone(clone, tmp_path / "second"))
    dvc(second, "pull")
    assert "not in cache" in dvc(second, "status").stdout
    result = fsck(second, "--remote", "shared")
    assert result.returncode == 1
    assert "(data): damaged, " in result.stdout and "workspace: data: " in result.stdout
    fsck(clone, "--remote", "shared", "--remove")
    assert dvc(clone, "push").returncode == 0 and dvc(second, "pull").returncode == 0
    assert files_of(second / "data") == files_of(clone / "data")
    assert "nothing is wrong" in fsck(second, "--remote", "shared").stdout
