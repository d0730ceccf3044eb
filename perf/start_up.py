"""Time a cell from the start of its process to the loading of its model, next to `import torch` alone.

    python -m perf.start_up [--starts 10]

Needs the models and benchmarks that `dvc repro` leaves, and a quiet machine. The three kinds of process start
in turns. The first turn, which reads files from the disk, does not count.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from perf.beside import ROOT

CELL = """
import os, sys, time
# as `python -m stages.evaluate` has it while it imports
arguments, sys.argv = sys.argv, ["-m"]
from reprotune.pipeline.guard import stage
from stages import evaluate
from reprotune.model import loading

def load_base(*_):
    print(time.time())
    sys.stdout.flush()
    os._exit(0)

loading.load_base = load_base
sys.argv = arguments
stage(evaluate.main)
"""
TORCH = "import time, torch; print(time.time())"
INPUTS = [
    "hellaswag",
    "--base",
    "models/base",
    "--data",
    "data/raw/benchmarks/hellaswag",
    "--templates",
    "templates",
]


def seconds(code: str, arguments: list[str], environment: dict[str, str]) -> float:
    begin = time.time()
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        sys.exit(f"the cell ended before its model was loaded:\n{result.stderr[-3000:]}")
    return float(result.stdout.splitlines()[-1]) - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=10)
    starts = parser.parse_args().starts
    with tempfile.TemporaryDirectory() as name:
        outputs = [f"--{kind}={name}/{kind}" for kind in ("checkpoints", "samples", "metrics")]
        kinds = {
            "a cell of the base": (CELL, [*INPUTS, *outputs, "--adapter", "models/base"], {}),
            "of an adapter, as DVC starts it": (
                CELL,
                [*INPUTS, *outputs, "--adapter", "models/sft"],
                {"DVC_STAGE": "evaluate@sft-hellaswag"},
            ),
            "import torch": (TORCH, [], {}),
        }
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(starts + 1):
            for kind, given in kinds.items():
                took = seconds(*given)
                if turn:
                    found[kind].append(took)
    for kind, took in found.items():
        print(f"{kind:32} {statistics.median(took):.2f} s ({min(took):.2f} to {max(took):.2f})")


if __name__ == "__main__":
    main()
