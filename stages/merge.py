"""Merge the trained adapter into the base model, and hold the result against the adapter."""

from reprotune import params_file, process
from reprotune.model import merging
from reprotune.pipeline.guard import stage


def main() -> None:
    paths = process.arguments(__doc__, "base", "adapter", "data", "templates", "out", "metrics")
    merging.run(params_file.load(), paths)


if __name__ == "__main__":
    stage(main)
