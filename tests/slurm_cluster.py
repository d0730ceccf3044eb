"""A Slurm cluster of two nodes on one machine. It needs root and Debian's slurm-wlm and munge.

python -m tests.slurm_cluster COMMAND...      run a command while the cluster is up, with SLURM_CONF set
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
NodeName=n1 NodeAddr=127.0.0.1 NodeHostname={host} Port={first} CPUs=1 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.1 NodeHostname={host} Port={second} CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why the cluster cannot start on this machine, or None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [
        name
        for name in ("munged", "slurmctld", "slurmd", "srun")
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)" if absent else None


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Run the daemons as child processes; yields the environment that srun and sbatch need."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("state", "spool-n1", "spool-n2"):
            (folder / part).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        port, first, second = free_ports(3)
        conf = folder / "slurm.conf"
        conf.write_text(
            CONF.format(
                host=socket.gethostname().split(".")[0], folder=folder, port=port, first=first, second=second
            )
        )
        environment = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        munge = [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid",
            f"--seed-file={folder}/munge.seed",
            f"--log-file={folder}/munge.log",
        ]
        commands = [
            munge,
            ["slurmctld", "-D", "-c", "-f", str(conf)],
            ["slurmd", "-D", "-N", "n1", "-f", str(conf)],
            ["slurmd", "-D", "-N", "n2", "-f", str(conf)],
        ]
        daemons = []
        try:
            for command in commands:
                daemons.append(
                    subprocess.Popen(
                        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                    )
                )
                time.sleep(1)
            deadline = time.monotonic() + 60
            while "idle" not in (
                state := subprocess.run(
                    ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
                ).stdout
            ):
                if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons):
                    logs = "\n".join(
                        f"{log.name}: {log.read_text()[-800:]}" for log in sorted(folder.glob("*.log"))
                    )
                    raise RuntimeError(f"the cluster did not come up, sinfo says {state!r}\n{logs}")
                time.sleep(0.5)
            yield environment
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                daemon.wait(timeout=30)


if __name__ == "__main__":
    with cluster() as environment:
        sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)
