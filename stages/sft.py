"""Supervised fine-tuning: train a LoRA adapter on the packed instruction rows with TRL's SFTTrainer.

The rows arrive tokenized, with labels on the answers and their end-of-turn tokens alone. Held-out loss before and after
is in nats a token, over all labelled tokens of the held-out rows.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from trl import SFTConfig, SFTTrainer

from stages import command, launch, modeling, params, training
from stages.chat import IGNORED, load_tokenizer
from stages.records import write_json

CURVE = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "tokens": "num_tokens", "token_accuracy": "mean_token_accuracy"}


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    modeling.start(settings.seed)
    tokenizer = load_tokenizer(paths.base, paths.templates / f"{settings.model.chat_template}.jinja")
    train, held_out = (training.dataset(paths.data / f"{part}.parquet") for part in ("train", "held_out"))
    model = modeling.add_adapter(modeling.load_base(paths.base, settings.model), settings.lora, settings.seed)
    times = training.StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        shared = training.arguments(settings.sft, settings.model.dtype, settings.seed, folder, launch.world_size())
        config = SFTConfig(
            **shared,
            num_train_epochs=settings.sft.epochs,
            max_length=None,
            padding_free=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        with modeling.adapter_dtype_kept(model):
            trainer = SFTTrainer(model, config, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer, callbacks=[times])
        before = held_out_loss(trainer, "held-out loss before")
        trainer.train()
        after = held_out_loss(trainer, "held-out loss after")
    if launch.is_main():
        rows = training.curve(trainer.state.log_history, CURVE)
        modeling.save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, paths.out)
        training.write_curves(rows, times.seconds, paths.curves, paths.speed)
        write_json(paths.metrics, summary(rows, before, after, labelled(held_out), len(train)))


def labelled(rows) -> int:
    """Tokens that the loss is measured on; the first of an example is never predicted, and never labelled."""
    return sum(label != IGNORED for row in rows for label in row["labels"])


@torch.no_grad()
def held_out_loss(trainer: SFTTrainer, label: str) -> float:
    """Mean negative log-likelihood, in nats, of the labelled tokens of the trainer's eval rows."""
    trainer.model.eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in tqdm(trainer.get_eval_dataloader(), desc=label, unit="batch", disable=not launch.is_main()):
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            outputs = trainer.model(**inputs, fused_lm_head=True)
        total += trainer.accelerator.gather_for_metrics(-outputs.log_probs.double().sum()).sum().cpu()
        count += int(trainer.accelerator.gather_for_metrics(outputs.label_mask.sum()).sum())
    return float(total) / count


def summary(rows: list[dict[str, float]], before: float, after: float, tokens: int, train_rows: int) -> dict[str, float]:
    return {
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "held_out_tokens": tokens,
        "train_loss_first": rows[0]["loss"],
        "train_loss_last": rows[-1]["loss"],
        "train_rows": train_rows,
        "train_tokens": rows[-1]["tokens"],
        "steps": len(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "data", "templates", "launch-config", "out", "metrics", "curves", "speed"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    settings = params.load()
    if not launch.relaunched("stages.sft", paths.launch_config):
        run(settings, paths)


if __name__ == "__main__":
    command(main)
