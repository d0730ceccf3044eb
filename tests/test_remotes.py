"""DVC remotes as a team uses them: a local folder, S3 (rclone's server) and SSH (OpenSSH), both on loopback, with what goes wrong on them."""

import getpass
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from stages import die_with_parent
from stages.provenance import md5
from tests import tiny
from tests.clones import DVC, ENVIRONMENT, call, own_copy

SSHD = Path("/usr/sbin/sshd")
FSCK = [sys.executable, "-m", "stages.fsck"]
KINDS = ("local", "s3", "ssh")


@dataclass
class Storage:
    """Where a remote keeps its objects, and how it is reached."""

    folder: Path
    """As the server sees it."""
    url: str
    settings: dict[str, str] = field(default_factory=dict)
    """What goes to .dvc/config.local beside the URL."""
    refused: dict[str, str] = field(default_factory=dict)
    """Settings with credentials that the server does not accept."""
    closed: dict[str, str] = field(default_factory=dict)
    """Settings with a port where nobody listens."""
    pid: int | None = None

    def objects(self) -> dict[str, Path]:
        """By name, the object's file."""
        folder = self.folder / "files" / "md5"
        return {file.parent.name + file.name: file for file in folder.rglob("*") if file.is_file()}

    def used_by(self, clone: Path, **settings: str) -> Path:
        """A clone whose remote this is."""
        for key, value in {"url": self.url, **self.settings, **settings}.items():
            call(*DVC, "remote", "modify", "--local", "shared", key, value, cwd=clone)
        return clone


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(command: list[str], port: int, log: Path) -> subprocess.Popen:
    """A server that ends with this process, once it listens."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=partial(die_with_parent, signal.SIGKILL))
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
def s3(tmp_path_factory) -> Iterator[Storage]:
    root, port, secret = tmp_path_factory.mktemp("s3"), free_port(), secrets.token_hex(8)
    (root / "bucket").mkdir()
    rclone = Path(sys.executable).with_name("rclone")
    # tests change files behind its back
    options = ["--dir-cache-time", "0s", "--config", str(root / "none.conf"), "--auth-key", f"team,{secret}", "--addr", f"127.0.0.1:{port}"]
    process = serve([str(rclone), "serve", "s3", *options, str(root)], port, root.with_suffix(".log"))
    endpoint = f"http://127.0.0.1:{port}"
    yield Storage(
        root / "bucket",
        "s3://bucket",
        {"endpointurl": endpoint, "access_key_id": "team", "secret_access_key": secret, "region": "us-east-1"},
        {"secret_access_key": "wrong"},
        {"endpointurl": f"http://127.0.0.1:{free_port()}"},
        process.pid,
    )
    end(process)


@pytest.fixture(scope="module")
def ssh(tmp_path_factory) -> Iterator[Storage]:
    if not SSHD.exists():
        pytest.skip(f"{SSHD} is not there: install openssh-server")
    root, port = tmp_path_factory.mktemp("ssh"), free_port()
    for name in ("host", "authorized", "other"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name), cwd=root)
    if os.getuid() == 0:
        # where sshd drops its privileges
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    lines = ["ListenAddress 127.0.0.1", f"Port {port}", f"HostKey {root}/host", "PidFile none", f"AuthorizedKeysFile {root}/authorized.pub"]
    lines += ["StrictModes no", "UsePAM no", "PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin yes", "Subsystem sftp internal-sftp"]
    (root / "sshd_config").write_text("\n".join(lines) + "\n")
    process = serve([str(SSHD), "-D", "-e", "-f", str(root / "sshd_config")], port, root.with_suffix(".log"))
    (root / "storage").mkdir()
    settings = {"user": getpass.getuser(), "port": str(port), "keyfile": str(root / "authorized")}
    yield Storage(root / "storage", f"ssh://127.0.0.1{root}/storage", settings, {"keyfile": str(root / "other")}, {"port": str(free_port())}, process.pid)
    end(process)


@pytest.fixture(scope="module", params=KINDS)
def storage(request, tmp_path_factory) -> Storage:
    if request.param == "local":
        folder = tmp_path_factory.mktemp("local")
        return Storage(folder, str(folder))
    return request.getfixturevalue(request.param)
