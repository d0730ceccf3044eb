"""Tokenize the preference pairs into shards."""

from reprotune import params_file, process
from reprotune.data import tokenizing
from reprotune.pipeline.guard import stage


def main() -> None:
    paths = process.arguments(
        __doc__, "raw", "base", "templates", "contamination", "out", "dropped", "metrics"
    )
    tokenizing.preferences(params_file.load(), paths)


if __name__ == "__main__":
    stage(main)
