"""The stage `dpo` (https://arxiv.org/abs/2305.18290): TRL's DPOTrainer trains the SFT policy on pairs.

Before the first step the policy must equal the cached reference, which makes every reward margin zero.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from reprotune import params
from reprotune.compat.trl import (
    CachedReferenceTrainer,
    adapter_dtype_kept,
    drop_frozen_copy,
    score_only_labelled_tokens,
    skip_hashing_the_model,
)
from reprotune.data.shards import read_shards
from reprotune.data.templates import load_tokenizer, template_file
from reprotune.errors import InputError
from reprotune.model import determinism, loading, policies
from reprotune.model.policies import Policy
from reprotune.records import write_metrics
from reprotune.training import checkpoints, curves, distributed, launching, ordering, pairs, speed, trainers
from reprotune.training.callbacks import Measure, SaveCheckpoints, StopAtNonFinite
from reprotune.training.rewards import check_start, rewards

CURVE = {
    "loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "tokens": "num_tokens",
    "reward_margin": "rewards/margins", "reward_accuracy": "rewards/accuracies",
    "logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected",
}  # fmt: skip
"""Columns of the training curve, with the trainer's keys. Its `loss` is the one of `dpo.loss`."""
MEASURES = {
    "sigmoid_loss": "loss", "margin": "reward margin", "accuracy": "reward accuracy",
    "chosen": "chosen log-prob", "rejected": "rejected log-prob",
}  # fmt: skip
"""Names, in metrics and held-out curve, of what `rewards` returns."""
HEADLINE = {"held_out_loss": "sigmoid_loss", "held_out_margin": "margin", "held_out_accuracy": "accuracy"}
ROWS = {"train": "training pairs", "held_out": "held-out pairs"}
"""Names of the parts in the metrics."""


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    determinism.start(settings.seed)
    score_only_labelled_tokens()
    skip_hashing_the_model()
    template = template_file(paths.templates, paths.base, settings.model)
    tokenizer = load_tokenizer(paths.base, template)
    train, held_out = (with_reference(paths, part) for part in ("train", "held_out"))
    model = loading.load_policy(paths.base, paths.adapter, settings.model, trainable=True)
    launch_config = launching.config(paths.configs, settings.model.quantization)
    inputs = [paths.base, paths.adapter, paths.data, paths.reference, template, launch_config]
    with checkpoints.kept(
        paths.checkpoints,
        settings.model_dump(include={"seed", "model", "reference", "dpo"}, exclude={"model": {"source"}}),
        inputs,
    ) as run_folder:
        saving = SaveCheckpoints()
        trainer = new_trainer(settings, model, tokenizer, train, saving, run_folder)
        shared_prompts = pairs.share_prompts(model)
        policies.compute_in(model, settings.model.dtype)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        parts = {"train": train.take(min(pairs.MEASURED, len(train))), "held_out": held_out}

        def measure(part: str, label: str) -> dict[str, float]:
            return rewards(policy, parts[part], tokenizer.pad_token_id, settings, label)

        def check(before: Mapping[str, Mapping[str, float]]) -> None:
            difference = max(values["difference"] for values in before.values())
            check_start(difference, settings.model.dtype, paths)

        measuring_rewards = Measure(
            saving, settings.dpo.measurements, settings.dpo.steps, tuple(parts), measure, check
        )
        trained = trainers.train(trainer, saving, measuring_rewards, run_folder)
        trainers.save(policy, tokenizer, settings.model.dtype, paths)
        if distributed.is_main():
            tokens = pairs.computed(trainer.train_dataset, settings.dpo.micro_batch_size, shared_prompts)
            write_records(settings, paths, policy, trained, tokens.reshape(trained.steps, -1).sum(1).tolist())
        trainer.accelerator.end_training()


def with_reference(paths: argparse.Namespace, part: str) -> datasets.Dataset:
    """The tokenized pairs of `part`, with the columns of the cached reference.

    Raises:
        InputError: the reference has another number of rows.
    """
    rows, reference = read_shards(paths.data, part), ordering.table(paths.reference / f"{part}.parquet")
    if len(rows) != len(reference):
        raise InputError(
            f"{paths.reference / part}.parquet: {len(reference)} rows, expected {len(rows)} as in "
            f"{paths.data}; `dvc repro reference` makes it anew"
        )
    return datasets.concatenate_datasets([rows, reference], axis=1)


def new_trainer(
    settings: params.Params,
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    saving: SaveCheckpoints,
    run: Path,
) -> CachedReferenceTrainer:
    """The trainer of `dpo.steps` on `train`, with checkpoints in `run`."""
    steps = settings.dpo.steps
    config = DPOConfig(
        **trainers.arguments(settings.dpo, settings.seed, steps, run),
        beta=settings.dpo.beta,
        loss_type=settings.dpo.loss,
        label_smoothing=settings.dpo.label_smoothing,
        max_length=None,
        precompute_ref_log_probs=True,
    )
    rows = ordering.batches(train, pairs.COLUMNS, steps, settings.dpo.global_batch_size, settings.seed)
    with adapter_dtype_kept(model):
        trainer = CachedReferenceTrainer(
            model,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[saving, StopAtNonFinite()],
        )
    drop_frozen_copy(model)
    return trainer


def write_records(
    settings: params.Params,
    paths: argparse.Namespace,
    policy: Policy,
    trained: trainers.Trained,
    tokens: list[int],
) -> None:
    """Write curves, speed and metrics.

    Args:
        tokens: computed in each step; the curve counts those of TRL's rows, which hold every prompt twice.
    """
    curve = curves.curve(trained.log_history, CURVE)
    rows_of_trl = 2 * settings.dpo.steps * settings.dpo.global_batch_size
    flops = speed.flops_per_token(policy, curve[-1]["tokens"] / rows_of_trl)
    held_out_curve = [
        {
            "step": row["step"],
            **{name.replace(" ", "_").replace("-", "_"): row[key] for key, name in MEASURES.items()},
        }
        for row in trained.held_out_curve()
    ]
    curves.write_curves(paths.plots, "dpo", curve, held_out_curve)
    rows = speed.by_step(tokens, trained.records, flops, settings.model.dtype)
    speed.write_measured(paths.measured, "dpo", rows)
    write_metrics(paths.metrics, *summary(curve, trained))


def summary(
    curve: list[dict[str, float]], trained: trainers.Trained
) -> tuple[dict[str, float], dict[str, Any]]:
    """The headline and the details of the stage's metrics."""
    measured = [
        {
            "measure": name,
            "rows": rows,
            "n": trained.before[part]["pairs"],
            "unit": "pairs",
            "before": trained.before[part][key],
            "after": trained.after[part][key],
        }
        for part, rows in ROWS.items()
        for key, name in MEASURES.items()
    ]
    headline = {name: trained.after["held_out"][key] for name, key in HEADLINE.items()}
    return headline, {"steps": len(curve), "tokens": int(curve[-1]["tokens"]), "measured": measured}
