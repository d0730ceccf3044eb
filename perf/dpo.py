"""Compare DPO over three values of beta with three stock TRL runs.

    python -m perf.dpo [--pairs 32] [--batch 4] [--max_length 512] [--dtype float32]
                       [--quantization nf4] [--repeats 1]

Needs models/base and data/raw/preferences (`dvc repro fetch_model fetch_preference_data`) and a quiet
machine. Tokens, model, precision and optimizer steps are the same. Our side is the stage `reference` once and
the stage `dpo` for each beta, one pass over the pairs. TRL's is its DPOTrainer as it comes, which computes
the reference in every step. Seconds are those of optimizer steps and the reference pass, without
measurements; tokens include padding.
"""

import argparse
import csv
import time
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from perf.beside import ROOT
from perf.sft import as_it_comes, beside, count_tokens, time_steps

BETAS = (0.05, 0.1, 0.3)


def settings_of(arguments: argparse.Namespace, beta: float = 0.1):
    from reprotune import params_file
    from tests.conftest import changed

    return changed(
        params_file.load(ROOT / "params.yaml"),
        {
            "model.quantization": arguments.quantization,
            "model.dtype": arguments.dtype,
            "tokenize.dpo.max_length": arguments.max_length,
            "tokenize.dpo.max_dropped": 1.0,
            "tokenize.dpo.held_out": 1,
            "data.preferences.mix.dpo_demo.limit": None,
            "dpo.global_batch_size": arguments.batch,
            "dpo.micro_batch_size": arguments.micro_batch,
            "dpo.steps": arguments.pairs // arguments.batch,
            "dpo.beta": beta,
            "reference.batch_size": arguments.micro_batch,
        },
    )


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Tokenize the embedded pairs, keep the first of them, and train an SFT adapter for one step."""
    from perf import sft as perf_sft
    from reprotune.data import tokenizing
    from reprotune.data.shards import read_shards
    from reprotune.training import sft
    from tests import steps

    raw = folder / "raw_dpo" / "dpo_demo.parquet"
    raw.parent.mkdir()
    pq.write_table(pq.read_table(ROOT / "data/raw/preferences/dpo_demo.parquet"), raw)
    settings = settings_of(arguments)
    tokenizing.preferences(settings, steps.tokenize_paths(ROOT / "models/base", folder, "dpo"), 2)
    kept = read_shards(folder / "dpo_tokens", "train").data.table.slice(0, arguments.pairs)
    assert len(kept) == arguments.pairs, (
        f"--pairs: found {arguments.pairs}, expected at most the {len(kept)} within --max_length"
    )
    for shard in (folder / "dpo_tokens").glob("train-*.arrow"):
        shard.unlink()
    with pa.ipc.new_stream(folder / "dpo_tokens" / "train-0.arrow", kept.schema) as stream:
        stream.write_table(kept)
    own = argparse.Namespace(rows=4, batch=4, dtype=arguments.dtype, quantization=arguments.quantization)
    perf_sft.prepare(own, folder)
    sft.run(
        perf_sft.settings_of(own),
        argparse.Namespace(
            base=ROOT / "models/base",
            data=folder / "sft_tokens",
            templates=steps.TEMPLATES,
            out=folder / "sft",
            **steps.training(folder, "sft"),
        ),
    )


def ours(arguments: argparse.Namespace, folder: Path) -> dict:
    from reprotune.model import loading, policies
    from reprotune.training import dpo, pairs, reference
    from tests import steps

    counted: list[int] = []
    passes: list[tuple[float, int]] = []
    loaded, computed = loading.load_policy, pairs.log_probs

    def load(*given, **named):
        policy = loaded(*given, **named)
        policies.bare(policy).get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: counted.append(inputs[0].numel())
        )
        return policy

    def log_probs(*given, **named):
        before, begin = len(counted), time.monotonic()
        found = computed(*given, **named)
        passes.append((time.monotonic() - begin, sum(counted[before:])))
        return found

    # the stages' own functions, watched
    loading.load_policy, pairs.log_probs = load, log_probs
    shared = {
        "base": ROOT / "models/base",
        "adapter": folder / "sft",
        "data": folder / "dpo_tokens",
        "templates": steps.TEMPLATES,
    }
    reference.run(
        settings_of(arguments),
        argparse.Namespace(
            **shared, configs=steps.CONFIGS, checkpoints=folder / "checkpoints", out=folder / "reference"
        ),
    )
    seconds, tokens, losses = sum(took for took, _ in passes), sum(counted), []
    for beta in BETAS:
        counted.clear()
        passes.clear()
        dpo.run(
            settings_of(arguments, beta),
            argparse.Namespace(
                **shared, reference=folder / "reference", out=folder / "dpo", **steps.training(folder, "dpo")
            ),
        )
        curve, speed = (list(csv.DictReader((folder / name).open())) for name in ("dpo.csv", "dpo_speed.csv"))
        seconds += sum(float(row["seconds"]) for row in speed)
        # what is measured before, on the way and after is no step's
        tokens += sum(counted) - sum(count for _, count in passes)
        losses += [float(row["loss"]) for row in curve]
    return {"seconds": seconds, "tokens": tokens, "losses": losses}


def trl(arguments: argparse.Namespace, folder: Path) -> dict:
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    from reprotune.data.shards import read_shards
    from reprotune.data.templates import load_tokenizer
    from reprotune.model import loading, policies
    from reprotune.training import ordering

    tokenizer = load_tokenizer(ROOT / "models/base", ROOT / "templates/chatml.jinja")
    tokens, seconds, losses = 0, 0.0, []
    for beta in BETAS:
        settings = settings_of(arguments, beta)
        set_seed(settings.seed)
        model = loading.load_policy(ROOT / "models/base", folder / "sft", settings.model, trainable=True)
        rows = read_shards(folder / "dpo_tokens", "train")
        rows = ordering.batches(
            rows,
            ["prompt_ids", "chosen_ids", "rejected_ids"],
            settings.dpo.steps,
            arguments.batch,
            settings.seed,
        )
        config = DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=arguments.micro_batch,
            gradient_accumulation_steps=arguments.batch // arguments.micro_batch,
            max_length=None,
            learning_rate=settings.dpo.learning_rate,
            lr_scheduler_type=settings.dpo.lr_scheduler,
            warmup_steps=settings.dpo.warmup_ratio,
            max_steps=settings.dpo.steps,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=arguments.dtype == "bfloat16",
            gradient_checkpointing=arguments.checkpointing,
            save_strategy="no",
            train_sampling_strategy="sequential",
            beta=beta,
            seed=settings.seed,
        )
        with patch.object(DPOTrainer, "_prepare_dataset", lambda self, dataset, *_: dataset):
            trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
        as_it_comes()
        counted, took = count_tokens(policies.bare(model)), time_steps(trainer)
        trainer.train()
        seconds += sum(took)
        tokens += sum(counted)
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "tokens": tokens, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    beside("perf.dpo", parser, (prepare, ours, trl))


if __name__ == "__main__":
    main()
