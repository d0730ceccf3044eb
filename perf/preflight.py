"""Compare preflight's estimates with what the stages take here: peak memory and seconds.

    python -m perf.preflight [--utilization 0.6]

Needs a finished `dvc repro` and a quiet machine. Each stage's command of dvc.yaml runs in a process of its
own and writes to a temporary folder.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dvc.repo import Repo

from perf.beside import ROOT

WRITES = ("--out", "--metrics", "--plots", "--measured", "--checkpoints", "--samples")


def run(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and GiB at most."""
    for option in WRITES:
        if option in arguments:
            arguments[arguments.index(option) + 1] = str(folder / arguments[arguments.index(option) + 1])
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments[1:]], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.monotonic() - begin, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--utilization", type=float)
    utilization = parser.parse_args().utilization
    os.chdir(ROOT)
    with Repo(str(ROOT)) as repo:
        commands = {stage.addressing: shlex.split(stage.cmd) for stage in repo.index.stages}
    measured = {}
    with tempfile.TemporaryDirectory(dir=ROOT / ".dvc" / "tmp") as folder:
        for stage in ("sft", "reference", "dpo", "evaluate"):
            measured[stage] = [
                run(command, Path(folder))
                for name, command in commands.items()
                if name.split("@")[0] == stage
            ]
    # only now: a process counts what its parent held as its own
    from reprotune.cli import parser
    from reprotune.planning import needs, preflight

    given = [] if utilization is None else ["--utilization", str(utilization)]
    print(f"{'stage':12} {'GiB':>7} {'said':>7} {'ratio':>6} {'seconds':>9} {'said':>7} {'ratio':>6}")
    for need in needs.needs(*preflight.prepared(parser().parse_args(["preflight", *given])))[0]:
        seconds, memory = (
            sum(took for took, _ in measured[need.stage]),
            max(most for _, most in measured[need.stage]),
        )
        print(
            f"{need.stage:12} {memory:7.2f} {need.memory / 2**30:7.2f} {need.memory / 2**30 / memory:6.2f} "
            f"{seconds:9.1f} {need.computing:7.1f} {need.computing / seconds:6.2f}"
        )


if __name__ == "__main__":
    main()
