"""The stage `sft`: TRL's SFTTrainer on packed rows, an adapter or all weights."""

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from reprotune import params
from reprotune.compat.trl import adapter_dtype_kept, score_only_labelled_tokens
from reprotune.data.chat_tokens import IGNORED
from reprotune.data.shards import read_shards
from reprotune.data.templates import load_tokenizer, template_file
from reprotune.model import determinism, loading, policies
from reprotune.model.attention import attend_by_segment
from reprotune.model.policies import Policy, measuring
from reprotune.records import write_metrics
from reprotune.training import (
    checkpoints,
    curves,
    distributed,
    launching,
    ordering,
    row_checks,
    speed,
    trainers,
)
from reprotune.training.callbacks import Measure, SaveCheckpoints, StopAtNonFinite

CURVE = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "tokens": "num_tokens"}
"""Columns of the training curve, with the trainer's keys."""


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    determinism.start(settings.seed)
    score_only_labelled_tokens()
    template = template_file(paths.templates, paths.base, settings.model)
    tokenizer = load_tokenizer(paths.base, template)
    train, held_out = (read_shards(paths.data, part) for part in ("train", "held_out"))
    model = loading.new_policy(paths.base, settings.model, settings.lora, settings.seed)
    with measuring(model):
        attend_by_segment(policies.bare(model))
    row_checks.check_labels(train)
    row_checks.check_isolation(model, train, settings.model)
    inputs = [paths.base, paths.data, template, launching.config(paths.configs, settings.model.quantization)]
    with checkpoints.kept(
        paths.checkpoints,
        settings.model_dump(include={"seed", "model", "lora", "sft"}, exclude={"model": {"source"}}),
        inputs,
    ) as run_folder:
        saving = SaveCheckpoints()
        trainer = new_trainer(settings, model, tokenizer, train, saving, run_folder)
        policy = trainer.accelerator.unwrap_model(trainer.model)

        def measure(_: str, label: str) -> dict[str, float]:
            size = settings.sft.micro_batch_size
            return {"loss": loss_per_token(policy, held_out, tokenizer.pad_token_id, size, label)}

        measuring_loss = Measure(
            saving, settings.sft.measurements, trainer.args.max_steps, ("held_out",), measure
        )
        trained = trainers.train(trainer, saving, measuring_loss, run_folder)
        trainers.save(policy, tokenizer, settings.model.dtype, paths)
        if distributed.is_main():
            write_records(settings, paths, policy, trained, train, held_out)
        trainer.accelerator.end_training()


def new_trainer(
    settings: params.Params,
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    saving: SaveCheckpoints,
    run: Path,
) -> SFTTrainer:
    """The trainer of `sft.epochs` over `train`, with checkpoints in `run`."""
    steps = math.ceil(len(train) * settings.sft.epochs / settings.sft.global_batch_size)
    config = SFTConfig(
        **trainers.arguments(settings.sft, settings.seed, steps, run),
        neftune_noise_alpha=settings.sft.neftune_noise_alpha,
        max_length=None,
        padding_free=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = ordering.batches(train, ["input_ids"], steps, settings.sft.global_batch_size, settings.seed)
    with adapter_dtype_kept(model):
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[saving, StopAtNonFinite()],
        )
    policies.compute_in(model, settings.model.dtype)
    return trainer


def loss_per_token(
    model: Policy, rows: datasets.Dataset, pad_token_id: int, batch_size: int, label: str
) -> float:
    """Mean negative log-likelihood, in nats, of the labelled tokens of packed rows."""
    collate = DataCollatorForLanguageModeling(pad_token_id, padding_free=True)

    def summed_loss(start: int) -> tuple[float, int]:
        """Of one batch: the sum, and the number of labelled tokens."""
        batch = collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        inputs = {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        outputs = model(**inputs, fused_lm_head=True)
        return -float(outputs.log_probs.double().sum()), int(outputs.label_mask.sum())

    with measuring(model):
        losses, counts = zip(
            *distributed.dealt_out(range(0, len(rows), batch_size), summed_loss, label), strict=True
        )
    return sum(losses) / sum(counts)


def write_records(
    settings: params.Params,
    paths: argparse.Namespace,
    policy: Policy,
    trained: trainers.Trained,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
) -> None:
    """Write curves, speed and metrics."""
    curve = curves.curve(trained.log_history, CURVE)
    example_length = pc.mean(pc.list_flatten(train.data.column("seq_lengths"))).as_py()
    flops = speed.flops_per_token(policy, example_length)
    tokens = [int(after - before) for before, after in pairwise([0, *(row["tokens"] for row in curve)])]
    curves.write_curves(paths.plots, "sft", curve, trained.held_out_curve())
    rows = speed.by_step(tokens, trained.records, flops, settings.model.dtype)
    speed.write_measured(paths.measured, "sft", rows)
    write_metrics(paths.metrics, *summary(curve, trained, labelled(held_out)))


def labelled(rows: datasets.Dataset) -> int:
    """Tokens that the loss is measured on; the first token of an example never has a label."""
    return pc.sum(pc.not_equal(pc.list_flatten(rows.data.column("labels")), IGNORED)).as_py()


def summary(
    curve: list[dict[str, float]], trained: trainers.Trained, held_out_tokens: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """The headline and the details of the stage's metrics."""
    before, after = (values["held_out"]["loss"] for values in (trained.before, trained.after))
    measured = {
        "measure": "loss",
        "rows": "held-out rows",
        "n": held_out_tokens,
        "unit": "tokens",
        "before": before,
        "after": after,
    }
    details = {"steps": len(curve), "tokens": int(curve[-1]["tokens"]), "measured": [measured]}
    return {"held_out_loss": after}, details
