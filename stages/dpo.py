"""Train what SFT left on preference pairs (TRL's DPOTrainer), against the cached reference."""

from reprotune import params_file, process
from reprotune.pipeline.guard import stage
from reprotune.training import dpo, launching


def main() -> None:
    paths = process.arguments(
        __doc__,
        "base",
        "adapter",
        "data",
        "reference",
        "templates",
        "configs",
        "checkpoints",
        "out",
        "metrics",
        "plots",
        "measured",
    )
    settings = params_file.load()
    if not launching.relaunched("stages.dpo", launching.config(paths.configs, settings.model.quantization)):
        dpo.run(settings, paths)


if __name__ == "__main__":
    stage(main)
