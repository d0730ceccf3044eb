"""Supervised fine-tuning: train an adapter, or all weights, on the packed instruction rows with TRL's SFTTrainer.

The rows arrive tokenized, with labels on the answers and their end-of-turn tokens alone. Held-out loss before and after
is in nats a token, over all labelled tokens of the held-out rows.
"""

import argparse
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from trl import SFTConfig, SFTTrainer

from stages import checkpoints, command, launch, modeling, packing, params, training
from stages.attention import attend_by_segment
from stages.records import write_json
from stages.templating import IGNORED, load_tokenizer

CURVE = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm", "tokens": "num_tokens"}


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    modeling.start(settings.seed)
    template = paths.templates / f"{settings.model.chat_template}.jinja"
    tokenizer = load_tokenizer(paths.base, template)
    train, held_out = (training.shards(paths.data, part) for part in ("train", "held_out"))
    model = modeling.new_policy(paths.base, settings.model, settings.lora, settings.seed)
    with modeling.measuring(model):
        attend_by_segment(modeling.bare(model))
    packing.check_labels(train)
    packing.check_isolation(model, train, settings.model)
    inputs = [paths.base, paths.data, template, launch.config(paths.configs, settings.model.quantization)]
    with checkpoints.kept(paths.checkpoints, settings.model_dump(include={"seed", "model", "lora", "sft"}), inputs) as run:
        saving = training.Checkpoints()
        steps = math.ceil(len(train) * settings.sft.epochs / settings.sft.global_batch_size)
        shared = training.arguments(settings.sft, settings.seed, steps, run, launch.world_size())
        config = SFTConfig(
            **shared,
            neftune_noise_alpha=settings.sft.neftune_noise_alpha,
            max_length=None,
            padding_free=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        rows = training.batches(train, ["input_ids"], steps, settings.sft.global_batch_size, settings.seed)
        with modeling.adapter_dtype_kept(model):
            trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[saving, training.FiniteLoss()])
        modeling.compute_in(model, settings.model.dtype)
        policy = trainer.accelerator.unwrap_model(trainer.model)

        def measure(label: str) -> dict[str, float]:
            return {"loss": packing.loss_per_token(policy, held_out, tokenizer.pad_token_id, settings.sft.micro_batch_size, label)}

        trainer.add_callback(training.Measuring(saving, settings.sft.measurements, steps, partial(measure, "held-out rows before"), measure))
        training.train(trainer, saving, run)
        (before,) = saving.records["before"]
        after = measure("held-out rows after")
        with training.gathered(policy):
            if launch.is_main():
                modeling.save_policy(policy, tokenizer, paths.base, settings.model.dtype, paths.out)
        if launch.is_main():
            curve = training.curve(trainer.state.log_history, CURVE)
            flops = training.flops_per_token(policy, pc.mean(pc.list_flatten(train.data.column("seq_lengths"))).as_py())
            computed = [int(after - before) for before, after in pairwise([0, *(row["tokens"] for row in curve)])]
            on_the_way = [{"step": 0, **before}, *saving.records["held_out"], {"step": steps, **after}]
            training.write_curves(paths.plots, "sft", curve, on_the_way, training.speed(computed, saving.records, flops, settings.model.dtype))
            write_json(paths.metrics, summary(curve, before["loss"], after["loss"], labelled(held_out)))
        trainer.accelerator.end_training()


def labelled(rows: datasets.Dataset) -> int:
    """Tokens that the loss is measured on; the first of an example is never predicted, and never labelled."""
    return pc.sum(pc.not_equal(pc.list_flatten(rows.data.column("labels")), IGNORED)).as_py()


def summary(rows: list[dict[str, float]], before: float, after: float, tokens: int) -> dict[str, Any]:
    measured = {"measure": "loss", "rows": "held-out rows", "n": tokens, "unit": "tokens", "before": before, "after": after}
    return {"steps": len(rows), "tokens": int(rows[-1]["tokens"]), "held_out_loss": after, "measured": [measured], "devices": training.devices()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "data", "templates", "configs", "checkpoints", "out", "metrics", "plots"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    settings = params.load()
    if not launch.relaunched("stages.sft", launch.config(paths.configs, settings.model.quantization)):
        run(settings, paths)


if __name__ == "__main__":
    command(main)
