"""Find the training rows that hold a benchmark's rows, by the n-grams that both have."""

from reprotune import params_file, process
from reprotune.data import contamination
from reprotune.pipeline.guard import stage


def main() -> None:
    paths = process.arguments(__doc__, "raw", "out", "metrics")
    contamination.run(params_file.load(), paths)


if __name__ == "__main__":
    stage(main)
