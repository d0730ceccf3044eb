"""Compare what reruns cost with the full run.

    python -m perf.repro [--repeats 3]

The reruns: nothing changed, another beta, another number of a benchmark's rows, another language of the
report. Runs on a clone of the last commit with a cache of its own, on a quiet machine; it takes 1.5 times the
full run. A no-op and `dvc status` are the best of the repeats, the others run once.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from perf.beside import ROOT

CHANGES = {
    "dpo.beta": (r"(?m)^  beta: .*$", "  beta: 0.3"),
    "benchmarks.winogrande.limit": (r"(?s)(winogrande:\n    source.*?limit: )\d+", r"\g<1>14"),
    "report.language": (r"language: en", "language: zh"),
}


def dvc(folder: Path, *arguments: str) -> tuple[float, list[str]]:
    """Seconds, and the stages that ran."""
    begin = time.monotonic()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["dvc", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if result.returncode:
        sys.exit(f"dvc {' '.join(arguments)} failed:\n{result.stdout[-3000:]}")
    return time.monotonic() - begin, re.findall(r"^Running stage '(\S+)':", result.stdout, re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        (folder / "dvc.lock").unlink()
        full, stages = dvc(folder, "repro")
        print(f"{'full':28} {full:8.1f} s  1.000  {len(stages)} stages", flush=True)
        params = (folder / "params.yaml").read_text()
        for change, (pattern, value) in CHANGES.items():
            changed, count = re.subn(pattern, value, params)
            assert count == 1 and changed != params, change
            (folder / "params.yaml").write_text(changed)
            took, ran = dvc(folder, "repro")
            print(f"{change:28} {took:8.1f} s  {took / full:.3f}  {', '.join(ran)}", flush=True)
            (folder / "params.yaml").write_text(params)
            took, ran = dvc(folder, "repro")
            print(
                f"{'back again':28} {took:8.1f} s  {took / full:.3f}  "
                f"{', '.join(ran) or 'from the run cache'}",
                flush=True,
            )
        for command in ("repro", "status"):
            took = min(dvc(folder, command)[0] for _ in range(repeats))
            print(f"{'no-op dvc ' + command:28} {took:8.2f} s  {took / full:.3f}", flush=True)


if __name__ == "__main__":
    main()
