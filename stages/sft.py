"""Supervised fine-tuning: train a LoRA adapter on the packed instruction rows with TRL's SFTTrainer.

The rows arrive tokenized, with labels on the answers and their end-of-turn tokens alone. Held-out loss before and after
is in nats a token, over all labelled tokens of the held-out rows.
"""

import argparse
from pathlib import Path
from typing import Any

from trl import SFTConfig, SFTTrainer

from stages import checkpoints, command, launch, modeling, params, training
from stages.chat import IGNORED, load_tokenizer
from stages.records import write_json

CURVE = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "tokens": "num_tokens", "token_accuracy": "mean_token_accuracy"}


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    modeling.start(settings.seed)
    template = paths.templates / f"{settings.model.chat_template}.jinja"
    tokenizer = load_tokenizer(paths.base, template)
    train, held_out = (training.shards(paths.data, part) for part in ("train", "held_out"))
    model = modeling.add_adapter(modeling.load_base(paths.base, settings.model), settings.lora, settings.seed)
    training.check_isolation(model, train, settings.model)
    inputs = [paths.base, paths.data, template, paths.launch_config]
    with checkpoints.kept(paths.checkpoints, settings.model_dump(include={"seed", "model", "lora", "sft"}), inputs) as run:
        saving = checkpoints.Checkpoints()
        shared = training.arguments(settings.sft, settings.model.dtype, settings.seed, run, launch.world_size())
        config = SFTConfig(
            **shared,
            num_train_epochs=settings.sft.epochs,
            max_length=None,
            padding_free=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        with modeling.adapter_dtype_kept(model):
            trainer = SFTTrainer(model, config, train_dataset=train, processing_class=tokenizer, callbacks=[saving, training.FiniteLoss()])
        policy = trainer.accelerator.unwrap_model(trainer.model)
        measure = (held_out, tokenizer.pad_token_id, settings.sft.micro_batch_size)
        before = training.loss_per_token(policy, *measure, "held-out loss before")
        checkpoints.train(trainer, saving, run)
        after = training.loss_per_token(policy, *measure, "held-out loss after")
        if launch.is_main():
            rows = training.curve(trainer.state.log_history, CURVE)
            modeling.save_adapter(policy, tokenizer, paths.out)
            training.write_curves(rows, saving.step_seconds, paths.curves, paths.speed)
            write_json(paths.metrics, summary(rows, before, after, labelled(held_out)))
        trainer.accelerator.end_training()


def labelled(rows) -> int:
    """Tokens that the loss is measured on; the first of an example is never predicted, and never labelled."""
    return sum(label != IGNORED for row in rows for label in row["labels"])


def summary(rows: list[dict[str, float]], before: float, after: float, tokens: int) -> dict[str, Any]:
    measured = {"measure": "loss", "rows": "held-out rows", "n": tokens, "unit": "tokens", "before": before, "after": after}
    return {"steps": len(rows), "tokens": int(rows[-1]["tokens"]), "held_out_loss": after, "measured": [measured]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "data", "templates", "launch-config", "checkpoints", "out", "metrics", "curves", "speed"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    settings = params.load()
    if not launch.relaunched("stages.sft", paths.launch_config):
        run(settings, paths)


if __name__ == "__main__":
    command(main)
