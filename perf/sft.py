"""Compare one epoch of SFT with stock TRL.

    python -m perf.sft [--rows 64] [--batch 8] [--dtype float32] [--quantization nf4] [--repeats 1]

Needs models/base and data/raw/sft (`dvc repro fetch_model fetch_sft_data`) and a quiet machine. Tokens,
model, precision and optimizer steps are the same. Our side is the stage `sft`. TRL's is its SFTTrainer as it
comes: a padded batch, the same initial adapter, tokenized rows in the same order. Seconds are those of the
optimizer steps; tokens include padding.
"""

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from perf.beside import ROOT, measured

SIDES = ("ours", "trl")


def settings_of(arguments: argparse.Namespace):
    from reprotune import params_file
    from tests.conftest import changed

    return changed(
        params_file.load(ROOT / "params.yaml"),
        {
            "model.quantization": arguments.quantization,
            "model.dtype": arguments.dtype,
            "tokenize.sft.packing": False,
            "tokenize.sft.held_out": 1,
            "sft.global_batch_size": arguments.batch,
            "sft.micro_batch_size": arguments.batch,
            "sft.epochs": 1.0,
        },
    )


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Tokenize the first rows of the embedded data."""
    from reprotune.data import packing, tokenizing
    from tests import steps

    raw = folder / "raw_sft" / "alpaca_demo.parquet"
    raw.parent.mkdir()
    pq.write_table(pq.read_table(ROOT / "data/raw/sft/alpaca_demo.parquet").slice(0, arguments.rows + 1), raw)
    settings = settings_of(arguments)
    data = settings.data.sft.model_copy(
        update={
            "mix": {"alpaca_demo": settings.data.sft.mix["alpaca_demo"].model_copy(update={"limit": None})}
        }
    )
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"sft": data})})
    paths = steps.tokenize_paths(ROOT / "models/base", folder, "sft")
    tokenizing.instructions(settings, paths, packing.packer(settings.tokenize.sft), 2)


def ours(arguments: argparse.Namespace, folder: Path) -> dict:
    from reprotune.training import sft
    from tests import steps

    sft.run(
        settings_of(arguments),
        argparse.Namespace(
            base=ROOT / "models/base",
            data=folder / "sft_tokens",
            templates=steps.TEMPLATES,
            out=folder / "sft",
            **steps.training(folder, "sft"),
        ),
    )
    curve, speed = (list(csv.DictReader((folder / name).open())) for name in ("sft.csv", "sft_speed.csv"))
    return {
        "seconds": sum(float(row["seconds"]) for row in speed),
        "tokens": int(float(curve[-1]["tokens"])),
        "losses": [float(row["loss"]) for row in curve],
    }


def trl(arguments: argparse.Namespace, folder: Path) -> dict:
    import math

    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from reprotune.data.shards import read_shards
    from reprotune.data.templates import load_tokenizer
    from reprotune.model import loading, policies
    from reprotune.training import ordering

    settings = settings_of(arguments)
    tokenizer = load_tokenizer(ROOT / "models/base", ROOT / "templates/chatml.jinja")
    set_seed(settings.seed)
    model = loading.new_policy(ROOT / "models/base", settings.model, settings.lora, settings.seed)
    rows = read_shards(folder / "sft_tokens", "train")
    steps = math.ceil(len(rows) / arguments.batch)
    rows = ordering.batches(rows, ["input_ids"], steps, arguments.batch, settings.seed).remove_columns(
        "seq_lengths"
    )
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=arguments.batch,
        max_length=None,
        learning_rate=settings.sft.learning_rate,
        lr_scheduler_type=settings.sft.lr_scheduler,
        warmup_steps=settings.sft.warmup_ratio,
        max_steps=steps,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=arguments.dtype == "bfloat16",
        gradient_checkpointing=arguments.checkpointing,
        save_strategy="no",
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=settings.seed,
    )
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    as_it_comes()
    tokens, seconds = count_tokens(policies.bare(model)), time_steps(trainer)
    trainer.train()
    return {
        "seconds": sum(seconds),
        "tokens": sum(tokens),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def as_it_comes() -> None:
    """Undo what our own modules change in TRL."""
    import trl.trainer.utils
    from trl.kernels import chunked_logprob

    trl.trainer.utils._use_triton = chunked_logprob._use_triton


def time_steps(trainer) -> list[float]:
    """Grows by the seconds of each optimizer step, as our own stages take them."""
    from transformers import TrainerCallback

    found: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            self.begin = time.monotonic()

        def on_step_end(self, *_, **__) -> None:
            found.append(time.monotonic() - self.begin)

    trainer.add_callback(Clock())
    return found


def count_tokens(model) -> list[int]:
    """Grows by the tokens of each forward pass; one that recomputes activations does not pass here."""
    found: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: found.append(inputs[0].numel())
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    beside("perf.sft", parser, (prepare, ours, trl))


def beside(module: str, parser: argparse.ArgumentParser, sides: tuple[Callable, Callable, Callable]) -> None:
    """Read the arguments, and run the one side that they name, or both in turns, after what both need."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="nf4")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--checkpointing", action="store_true", help="TRL's side with gradient checkpointing, its default"
    )
    by_name = {side.__name__: side for side in sides}
    parser.add_argument("--side", choices=list(by_name), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(by_name[arguments.side](arguments, arguments.folder) or {}))
    else:
        report(module, arguments)


def report(module: str, arguments: argparse.Namespace) -> None:
    """Run the sides in turns and print them, and the ratios of their sums."""
    flags = [
        f"--{key}={value}"
        for key, value in vars(arguments).items()
        if value is not None and not isinstance(value, bool)
    ]
    flags += [f"--{key}" for key, value in vars(arguments).items() if value is True]
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    (ROOT / ".dvc" / "tmp").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".dvc" / "tmp") as folder:
        measured(module, [*flags, "--side=prepare", f"--folder={folder}"], Path(folder))
        print("side seconds tokens peak_MiB losses")
        for _ in range(arguments.repeats):
            for side in SIDES:
                one = measured(module, [*flags, f"--side={side}", f"--folder={folder}"], Path(folder))
                found[side].append(one)
                losses = " ".join(f"{loss:.4f}" for loss in one["losses"])
                print(
                    f"{side} {one['seconds']:.1f} {one['tokens']} {one['peak_mib']:.0f} {losses}", flush=True
                )
    for key in ("seconds", "tokens", "peak_mib"):
        mine, theirs = (sum(one[key] for one in found[side]) for side in SIDES)
        print(f"{key}: {mine / theirs:.3f} of TRL's")
    print(
        "largest difference of a step's loss: "
        f"{max(abs(a - b) for a, b in zip(*(found[side][0]['losses'] for side in SIDES), strict=True)):.4f}"
    )


if __name__ == "__main__":
    main()
