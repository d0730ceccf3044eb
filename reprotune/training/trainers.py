"""What the SFT and the DPO stage share: arguments of TRL's trainers, training that resumes, and saving."""

import argparse
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from reprotune.compat.trl import resume_token_count
from reprotune.errors import InputError
from reprotune.model.policies import Policy
from reprotune.model.saving import save_policy
from reprotune.params import Training
from reprotune.training import checkpoints, distributed
from reprotune.training.callbacks import Measure, SaveCheckpoints


@dataclass
class Trained:
    """The records of a finished training."""

    log_history: list[dict[str, float]]
    """The trainer's own log."""
    records: dict[str, list[Any]]
    """Those of SaveCheckpoints."""
    before: dict[str, dict[str, float]]
    """By part, what was measured before the first step."""
    after: dict[str, dict[str, float]]
    steps: int

    def held_out_curve(self) -> list[dict[str, float]]:
        """A row for each measurement of the held-out part."""
        return [
            {"step": 0, **self.before["held_out"]},
            *self.records["on_the_way"],
            {"step": self.steps, **self.after["held_out"]},
        ]


def arguments(settings: Training, seed: int, steps: int, run: Path) -> dict[str, Any]:
    """Keyword arguments for TRL's SFTConfig and DPOConfig alike; checkpoints go to `run`.

    Raises:
        InputError: Liger's kernels are asked for and cannot run here, or the global batch cannot be split.
    """
    if settings.use_liger_kernel and not torch.cuda.is_available():
        raise InputError(
            "params.yaml: use_liger_kernel: found true, expected false on a machine without a GPU"
        )
    if settings.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise InputError(
            "params.yaml: use_liger_kernel: found true, and the package is not installed; "
            "`.venv/bin/pip install liger-kernel`"
        )
    constant = settings.lr_scheduler == "constant"
    return {
        "output_dir": str(run),
        "max_steps": steps,
        # `ordering.batches` has shuffled the rows
        "train_sampling_strategy": "sequential",
        # SaveCheckpoints decides when
        "save_strategy": "no",
        "save_total_limit": checkpoints.KEPT,
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation(settings, distributed.world_size()),
        "learning_rate": settings.learning_rate,
        # transformers' `constant` has no warm-up
        "lr_scheduler_type": "constant_with_warmup" if constant else settings.lr_scheduler,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_liger_kernel": settings.use_liger_kernel,
        # policies.compute_in sets the dtype
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
    }


def accumulation(settings: Training, processes: int) -> int:
    """Micro-batches that each process computes for one optimizer step.

    Raises:
        InputError: the global batch is no multiple of what all processes compute at once.
    """
    at_once = settings.micro_batch_size * processes
    if settings.global_batch_size % at_once:
        raise InputError(
            f"{type(settings).__name__.lower()}.global_batch_size: found {settings.global_batch_size}, "
            f"expected a multiple of micro_batch_size × devices = {settings.micro_batch_size} × {processes}; "
            "change one of them or use fewer devices"
        )
    return settings.global_batch_size // at_once


def train(trainer: Trainer, saving: SaveCheckpoints, measuring: Measure, run: Path) -> Trained:
    """Train from the newest whole checkpoint in `run`, and measure before, on the way and after.

    The trainer has `saving` among its callbacks.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is saved.
    """
    trainer.add_callback(measuring)
    newest = checkpoints.latest(run)
    if newest is not None:
        trainer_state = json.loads((newest / "trainer_state.json").read_text())
        saving.restore(trainer_state)
        resume_token_count(trainer, trainer_state["log_history"])
    with saving.stop_request.listening():
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps:
        sys.exit(f"ended on request at step {step} of {steps}: `dvc repro` resumes there")
    (before,) = saving.records["before"]
    return Trained(trainer.state.log_history, saving.records, before, measuring.all_parts("after"), steps)


def save(policy: Policy, tokenizer: PreTrainedTokenizerBase, dtype: str, paths: argparse.Namespace) -> None:
    """Write what was trained to `paths.out`, from the main process. All processes must call this."""
    with distributed.gathered(policy):
        if distributed.is_main():
            save_policy(policy, tokenizer, paths.base, dtype, paths.out)
