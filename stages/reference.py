"""Compute the log-probs of every pair's answers under the frozen SFT model, once."""

from reprotune import params_file, process
from reprotune.pipeline.guard import stage
from reprotune.training import launching, reference


def main() -> None:
    paths = process.arguments(
        __doc__, "base", "adapter", "data", "templates", "configs", "checkpoints", "out"
    )
    settings = params_file.load()
    if not launching.relaunched(
        "stages.reference", launching.config(paths.configs, settings.model.quantization)
    ):
        reference.run(settings, paths)


if __name__ == "__main__":
    stage(main)
