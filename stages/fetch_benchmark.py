"""Fetch one benchmark's rows to `data/raw/benchmarks/<b>`, in the columns that the Hub has."""

import argparse
from pathlib import Path

from reprotune import params_file
from reprotune.data import benchmarks
from reprotune.pipeline.guard import stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    benchmarks.run(arguments.name, params_file.load().benchmarks[arguments.name], arguments.out)


if __name__ == "__main__":
    stage(main)
