"""Direct preference optimization (https://arxiv.org/abs/2305.18290): TRL's DPOTrainer goes on training what SFT left.

The pairs arrive tokenized and the reference log-probs computed, so the subclass below keeps TRL from doing either
again. Before the first step the policy is the reference: unless its reward margin is zero, the stage stops.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import trl.trainer.dpo_trainer
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from stages import InputError, checkpoints, command, launch, modeling, pairs, params, training
from stages.records import write_json
from stages.templating import load_tokenizer

CURVE = {
    "loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "tokens": "num_tokens",
    "reward_margin": "rewards/margins", "reward_accuracy": "rewards/accuracies",
    "logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected",
}  # fmt: skip
MEASURES = {
    "loss": "loss", "margin": "reward margin", "accuracy": "reward accuracy", "chosen": "chosen log-prob", "rejected": "rejected log-prob",
}  # fmt: skip
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Largest difference, in nats, between the policy before training and the cached reference, for an answer of one token; rounding grows with the
square root of the tokens."""


# TRL's key of its own cache of the reference: a hash of all weights, for nothing
trl.trainer.dpo_trainer.hash_module = lambda _: None


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
    model = modeling.load_policy(paths.base, paths.adapter, settings.model, trainable=True)
    inputs = [paths.base, paths.adapter, paths.data, paths.reference, template, launch.config(paths.configs, settings.model.quantization)]
    with checkpoints.kept(paths.checkpoints, settings.model_dump(include={"seed", "model", "reference", "dpo"}), inputs) as run:
        saving = training.Checkpoints()
        shared = training.arguments(settings.dpo, settings.seed, settings.dpo.steps, run, launch.world_size())
        config = DPOConfig(
            **shared,
            beta=settings.dpo.beta,
            loss_type=settings.dpo.loss,
            label_smoothing=settings.dpo.label_smoothing,
            max_length=None,
            precompute_ref_log_probs=True,
        )
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        rows = training.batches(train, columns, settings.dpo.steps, settings.dpo.global_batch_size, settings.seed)
        with modeling.adapter_dtype_kept(model):
            trainer = CachedReferenceTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[saving, training.FiniteLoss()])
        if isinstance(model, PeftModel):
            # the trainer's own frozen copy of the adapter, which the cached log-probs replace
            model.delete_adapter("ref")
        shared_prompts = pairs.share_prompts(model)
        modeling.compute_in(model, settings.model.dtype)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        parts = {"train": train.take(min(pairs.MEASURED, len(train))), "held_out": held_out}

        def measure(part: str, label: str) -> dict[str, float]:
            return rewards(policy, parts[part], tokenizer.pad_token_id, settings, label)

        def before_the_first_step() -> dict[str, dict[str, float]]:
            found = {part: measure(part, f"{part} pairs before") for part in parts}
            check_start(max(values["difference"] for values in found.values()), settings.model.dtype, paths)
            return found

        trainer.add_callback(training.Measuring(saving, settings.dpo.measurements, settings.dpo.steps, before_the_first_step, partial(measure, "held_out")))
        training.train(trainer, saving, run)
        (before,) = saving.records["before"]
        after = {part: measure(part, f"{part} pairs after") for part in parts}
        with training.gathered(policy):
            if launch.is_main():
                modeling.save_policy(policy, tokenizer, paths.base, settings.model.dtype, paths.out)
        if launch.is_main():
            curve = training.curve(trainer.state.log_history, CURVE)
            flops = training.flops_per_token(policy, curve[-1]["tokens"] / (2 * settings.dpo.steps * settings.dpo.global_batch_size))
            computed = pairs.computed(rows, settings.dpo.micro_batch_size, shared_prompts).reshape(settings.dpo.steps, -1).sum(axis=1).tolist()
            on_the_way = [{"step": 0, **before["held_out"]}, *saving.records["held_out"], {"step": settings.dpo.steps, **after["held_out"]}]
            held_out_curve = [{"step": row["step"], **{name.replace(" ", "_").replace("-", "_"): row[key] for key, name in MEASURES.items()}} for row in on_the_way]
            training.write_curves(paths.plots, "dpo", curve, held_out_curve, training.speed(computed, saving.records, flops, settings.model.dtype))
            write_json(paths.metrics, summary(curve, before, after))
        trainer.accelerator.end_training()


def with_reference(paths: argparse.Namespace, part: str) -> datasets.Dataset:
    rows, reference = training.shards(paths.data, part), training.table(paths.reference / f"{part}.parquet")
    if len(rows) != len(reference):
        raise InputError(
            f"{paths.reference / part}.parquet: {len(reference)} rows, expected {len(rows)} as in {paths.data}; `dvc repro reference` makes it anew"
        )
    return datasets.concatenate_datasets([rows, reference], axis=1)


def rewards(policy: modeling.Policy, rows: datasets.Dataset, pad_token_id: int, settings: params.Params, label: str) -> dict[str, float]:
    """Means over pairs: reward margin, DPO's own loss, whichever is trained on, the answers' log-probs, and the share of pairs whose chosen
    answer has the higher reward (a tie counts half)."""
    found = pairs.log_probs(policy, rows, pad_token_id, settings.reference.batch_size, label)
    chosen, rejected = (
        torch.tensor(found[key], dtype=torch.float64) - torch.tensor(rows[f"ref_{key}_logps"], dtype=torch.float64)
        for key in ("chosen", "rejected")
    )
    tokens = torch.tensor([len(ids) for key in ("chosen", "rejected") for ids in rows[f"{key}_ids"]])
    margins = settings.dpo.beta * (chosen - rejected)
    return {
        "difference": float((torch.cat([chosen, rejected]).abs() / tokens.sqrt()).max()),
        "margin": float(margins.mean()),
        "accuracy": float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean()),
        "loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "chosen": sum(found["chosen"]) / len(rows),
        "rejected": sum(found["rejected"]) / len(rows),
        "pairs": len(rows),
    }


def check_start(difference: float, dtype: str, paths: argparse.Namespace) -> None:
    if not difference <= TOLERANCE[dtype]:
        raise InputError(
            f"{paths.reference}: before the first step the policy ({paths.adapter}) differs from the cached reference by {difference:.3g} "
            f"nats, divided by the square root of an answer's tokens; expected at most {TOLERANCE[dtype]}; `dvc repro --force reference` computes it anew"
        )


def summary(rows: list[dict[str, float]], before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, Any]:
    measured = [
        {"measure": measure, "rows": label, "n": before[part]["pairs"], "unit": "pairs", "before": before[part][key], "after": after[part][key]}
        for part, label in (("train", "training pairs"), ("held_out", "held-out pairs"))
        for key, measure in MEASURES.items()
    ]
    headline = {f"held_out_{key}": after["held_out"][key] for key in ("loss", "margin", "accuracy")}
    return {"steps": len(rows), "tokens": int(rows[-1]["tokens"]), "measured": measured, "devices": training.devices()} | headline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "adapter", "data", "reference", "templates", "configs", "checkpoints", "out", "metrics", "plots"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    settings = params.load()
    if not launch.relaunched("stages.dpo", launch.config(paths.configs, settings.model.quantization)):
        run(settings, paths)


if __name__ == "__main__":
    command(main)
