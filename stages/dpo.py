"""Direct preference optimization (https://arxiv.org/abs/2305.18290): TRL's DPOTrainer goes on training the SFT adapter.

The pairs arrive tokenized and the reference log-probs computed, so the subclass below keeps TRL from doing either
again. Before the first step the policy is the reference: unless its reward margin is zero, the stage stops.
"""

import argparse
from pathlib import Path
from typing import Any

import datasets
import torch
from trl import DPOConfig, DPOTrainer

from stages import InputError, checkpoints, command, launch, modeling, params, training
from stages.chat import load_tokenizer
from stages.records import write_json

CURVE = {
    "loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "tokens": "num_tokens",
    "reward_margin": "rewards/margins", "reward_accuracy": "rewards/accuracies",
    "logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected",
}  # fmt: skip
MEASURED_PAIRS = 512
"""Training pairs that are measured before and after, the first so many."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Largest difference, in nats an answer, between the policy before training and the cached reference."""


class CachedReferenceTrainer(DPOTrainer):
    """DPOTrainer on tokenized pairs whose rows bring their reference log-probs along."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, dataset, *_):
        return dataset


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    modeling.start(settings.seed)
    template = paths.templates / f"{settings.model.chat_template}.jinja"
    tokenizer = load_tokenizer(paths.base, template)
    train, held_out = (with_reference(paths, part) for part in ("train", "held_out"))
    model = modeling.load_adapter(modeling.load_base(paths.base, settings.model), paths.adapter, trainable=True)
    inputs = [paths.base, paths.adapter, paths.data, paths.reference, template, paths.launch_config]
    with checkpoints.kept(paths.checkpoints, settings.model_dump(include={"seed", "model", "reference", "dpo"}), inputs) as run:
        saving = checkpoints.Checkpoints()
        shared = training.arguments(settings.dpo, settings.model.dtype, settings.seed, run, launch.world_size())
        config = DPOConfig(
            **shared,
            max_steps=settings.dpo.steps,
            beta=settings.dpo.beta,
            loss_type=settings.dpo.loss,
            max_length=None,
            precompute_ref_log_probs=True,
        )
        with modeling.adapter_dtype_kept(model):
            trainer = CachedReferenceTrainer(model, args=config, train_dataset=train, processing_class=tokenizer, callbacks=[saving, training.FiniteLoss()])
        # the trainer's own frozen copy of the adapter, which the cached log-probs replace
        model.delete_adapter("ref")
        measured = {"train": train.take(min(MEASURED_PAIRS, len(train))), "held_out": held_out}
        before = {part: rewards(trainer, rows, settings, f"{part} pairs before") for part, rows in measured.items()}
        check_start(max(values["difference"] for values in before.values()), settings.model.dtype, paths)
        checkpoints.train(trainer, saving, run)
        after = {part: rewards(trainer, rows, settings, f"{part} pairs after") for part, rows in measured.items()}
        if launch.is_main():
            rows = training.curve(trainer.state.log_history, CURVE)
            modeling.save_adapter(trainer.accelerator.unwrap_model(trainer.model), tokenizer, paths.out)
            training.write_curves(rows, saving.step_seconds, paths.curves, paths.speed)
            write_json(paths.metrics, summary(rows, before, after))
        trainer.accelerator.end_training()


def with_reference(paths: argparse.Namespace, part: str) -> datasets.Dataset:
    pairs, reference = training.shards(paths.data, part), training.table(paths.reference / f"{part}.parquet")
    if len(pairs) != len(reference):
        raise InputError(
            f"{paths.reference / part}.parquet: {len(reference)} rows, expected {len(pairs)} as in {paths.data}; `dvc repro reference` makes it anew"
        )
    return datasets.concatenate_datasets([pairs, reference], axis=1)


def rewards(trainer: DPOTrainer, rows: datasets.Dataset, settings: params.Params, label: str) -> dict[str, float]:
    """Mean reward margin and loss, and share of pairs whose chosen answer has the higher reward (a tie counts half)."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = training.pair_log_probs(model, rows, trainer.processing_class.pad_token_id, settings.reference.batch_size, label)
    chosen, rejected = (
        torch.tensor(found[key], dtype=torch.float64) - torch.tensor(rows[f"ref_{key}_logps"], dtype=torch.float64)
        for key in ("chosen", "rejected")
    )
    margins = settings.dpo.beta * (chosen - rejected)
    return {
        "difference": float(torch.cat([chosen, rejected]).abs().max()),
        "margin": float(margins.mean()),
        "accuracy": float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean()),
        "loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "pairs": len(rows),
    }


def check_start(difference: float, dtype: str, paths: argparse.Namespace) -> None:
    if not difference <= TOLERANCE[dtype]:
        raise InputError(
            f"{paths.reference}: before the first step the policy ({paths.adapter}) differs from the cached reference by {difference:.3g} "
            f"nats an answer, expected at most {TOLERANCE[dtype]}; `dvc repro --force reference` computes it anew"
        )


def summary(rows: list[dict[str, float]], before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, Any]:
    measured = [
        {"measure": measure, "rows": label, "n": before[part]["pairs"], "unit": "pairs", "before": before[part][key], "after": after[part][key]}
        for part, label in (("train", "training pairs"), ("held_out", "held-out pairs"))
        for key, measure in (("loss", "loss"), ("margin", "reward margin"), ("accuracy", "reward accuracy"))
    ]
    headline = {f"held_out_{key}": after["held_out"][key] for key in ("loss", "margin", "accuracy")}
    return {"steps": len(rows), "tokens": int(rows[-1]["tokens"]), "measured": measured} | headline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "adapter", "data", "reference", "templates", "launch-config", "checkpoints", "out", "metrics", "curves", "speed"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    settings = params.load()
    if not launch.relaunched("stages.dpo", paths.launch_config):
        run(settings, paths)


if __name__ == "__main__":
    command(main)
