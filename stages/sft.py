"""Fine-tune the base model on instructions: an adapter, or all weights (TRL's SFTTrainer)."""

from reprotune import params_file, process
from reprotune.pipeline.guard import stage
from reprotune.training import launching, sft


def main() -> None:
    paths = process.arguments(
        __doc__, "base", "data", "templates", "configs", "checkpoints", "out", "metrics", "plots", "measured"
    )
    settings = params_file.load()
    if not launching.relaunched("stages.sft", launching.config(paths.configs, settings.model.quantization)):
        sft.run(settings, paths)


if __name__ == "__main__":
    stage(main)
