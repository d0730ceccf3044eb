"""Compare tokenizing raw rows into shards with TRL's preparation of the same rows: speed and memory.

    python -m perf.tokenize sft 10000 100000 1000000
    python -m perf.tokenize dpo 10000 100000

Needs models/base (`dvc repro fetch_model`) and a quiet machine. Rows are synthetic, with the words and
lengths of the embedded Alpaca rows. Each side runs in a process of its own with as many workers; TRL gets its
rows in the form that it likes best. Seconds leave imports out; memory is the peak sum over all processes,
shared pages counted once. Near-duplicates are off: TRL looks for none.
"""

import argparse
import json
import os
import random
import tempfile
import time
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from perf.beside import ROOT, measured

GROUP = 10_000
MAX_LENGTH = {"sft": 2048, "dpo": 1024}


def synthetic(kind: str, count: int, file: Path, conversational: bool) -> None:
    """Draw rows by seed, the same for both sides, in the pipeline's format or TRL's."""
    rng = random.Random(0)
    rows = pq.read_table(ROOT / "data/raw/sft/alpaca_demo.parquet").to_pylist()
    words = " ".join(f"{row['instruction']} {row['input']} {row['output']}" for row in rows).split()
    lengths = [
        (len(row["instruction"].split()) + len(row["input"].split()), len(row["output"].split()))
        for row in rows
    ]

    def text(size: int) -> str:
        start = rng.randrange(len(words) - size - 1)
        middle = rng.randrange(size + 1)
        other = rng.randrange(len(words) - size - 1)
        return " ".join(words[start : start + middle] + words[other : other + size - middle])

    writer = None
    for start in range(0, count, GROUP):
        group = []
        for _ in range(start, min(start + GROUP, count)):
            ask, answer = (max(1, size) for size in rng.choice(lengths))
            answers = [text(answer), text(answer)]
            group.append(row(kind, text(ask), answers, conversational))
        table = pa.Table.from_pylist(group)
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    writer.close()


def row(kind: str, prompt: str, answers: list[str], conversational: bool) -> dict:
    turns = [{"role": "assistant", "content": answer} for answer in answers]
    user = [{"role": "user", "content": prompt}]
    if kind == "sft":
        return (
            {"prompt": user, "completion": turns[:1]}
            if conversational
            else {"instruction": prompt, "input": "", "output": answers[0]}
        )
    if conversational:
        return {"prompt": user, "chosen": turns[:1], "rejected": turns[1:]}
    return {"chosen": [*user, turns[0]], "rejected": [*user, turns[1]]}


def ours(kind: str, file: Path, folder: Path, processes: int) -> float:
    from reprotune import params_file
    from reprotune.data import packing, tokenizing
    from tests.conftest import changed

    # packing imports it when it begins
    import_module("trl.data_utils")

    name = "sft" if kind == "sft" else "preferences"
    entry = {
        "format": "alpaca" if kind == "sft" else "ultrafeedback",
        "ignore": [],
        "source": {"kind": "local", "path": "-", "sha256": "0" * 64},
    }
    settings = changed(
        params_file.load(ROOT / "params.yaml"),
        {
            f"data.{name}.sources": {file.stem: entry},
            f"data.{name}.mix": {file.stem: {"limit": None, "weight": 1.0}},
            f"tokenize.{kind}.deduplicate.near": None,
            f"tokenize.{kind}.max_length": MAX_LENGTH[kind],
        },
    )
    paths = argparse.Namespace(
        raw=file.parent,
        base=ROOT / "models/base",
        templates=ROOT / "templates",
        contamination=folder,
        out=folder / "tokens",
        dropped=folder / "dropped.parquet",
        metrics=folder / "metrics.json",
    )
    begin = time.monotonic()
    if kind == "sft":
        tokenizing.instructions(settings, paths, packing.packer(settings.tokenize.sft), processes)
    else:
        tokenizing.preferences(settings, paths, processes)
    return time.monotonic() - begin


def trl(kind: str, file: Path, folder: Path, processes: int) -> float:
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from reprotune.data.templates import load_tokenizer
    from tests import tiny

    tokenizer = load_tokenizer(ROOT / "models/base", ROOT / "templates/chatml.jinja")
    model = AutoModelForCausalLM.from_pretrained(tiny.make_model(folder / "tiny"))
    rows = datasets.load_dataset(
        "parquet", data_files=str(file), split="train", cache_dir=str(folder / "cache")
    )
    shared = {
        "output_dir": str(folder),
        "max_length": MAX_LENGTH[kind],
        "dataset_num_proc": processes,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    begin = time.monotonic()
    if kind == "sft":
        SFTTrainer(model, SFTConfig(**shared, packing=True), train_dataset=rows, processing_class=tokenizer)
    else:
        DPOTrainer(model, args=DPOConfig(**shared), train_dataset=rows, processing_class=tokenizer)
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["sft", "dpo"])
    parser.add_argument("rows", type=int, nargs="*")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", choices=["ours", "trl"])
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = ours if arguments.side == "ours" else trl
        print(
            json.dumps(
                {"seconds": side(arguments.kind, arguments.file, arguments.folder, arguments.processes)}
            )
        )
        return
    print("rows side seconds rows/s peak_MiB")
    for count in arguments.rows:
        speed = {}
        for side in ("ours", "trl"):
            if arguments.only in (None, side):
                with tempfile.TemporaryDirectory(dir=ROOT / ".dvc" / "tmp") as folder:
                    file = Path(folder) / "raw" / "rows.parquet"
                    file.parent.mkdir()
                    synthetic(arguments.kind, count, file, conversational=side == "trl")
                    own = [
                        "--side",
                        side,
                        "--file",
                        str(file),
                        "--folder",
                        folder,
                        "--processes",
                        str(arguments.processes),
                    ]
                    found = measured("perf.tokenize", [arguments.kind, *own], Path(folder))
                speed[side] = count / found["seconds"]
                print(
                    f"{count} {side} {found['seconds']:.1f} {speed[side]:.0f} {found['peak_mib']:.0f}",
                    flush=True,
                )
        if len(speed) == 2:
            print(f"{count} rows/s are {speed['ours'] / speed['trl']:.2f} times TRL's", flush=True)


if __name__ == "__main__":
    main()
