"""Fetch the base model from its pinned source to `models/base`: safetensors, config and tokenizer."""

from reprotune import params_file, process
from reprotune.model import fetching
from reprotune.pipeline.guard import stage


def main() -> None:
    paths = process.arguments(__doc__, "out")
    fetching.run(params_file.load().model, paths.out)


if __name__ == "__main__":
    stage(main)
