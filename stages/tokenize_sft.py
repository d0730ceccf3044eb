"""Tokenize the instruction rows into shards, with labels on the answers alone, packed if so set."""

from reprotune import params_file, process
from reprotune.data import packing, tokenizing
from reprotune.pipeline.guard import stage


def main() -> None:
    paths = process.arguments(
        __doc__, "raw", "base", "templates", "contamination", "out", "dropped", "metrics"
    )
    settings = params_file.load()
    tokenizing.instructions(settings, paths, packing.packer(settings.tokenize.sft))


if __name__ == "__main__":
    stage(main)
