"""Fetch one benchmark's rows to `data/raw/benchmarks/<b>`, in the columns that the Hub has."""

from reprotune import params_file, process
from reprotune.data import benchmarks
from reprotune.pipeline.guard import stage


def main() -> None:
    found = process.arguments(__doc__, "out", of="benchmark")
    benchmarks.run(found.benchmark, params_file.load().benchmarks[found.benchmark], found.out)


if __name__ == "__main__":
    stage(main)
