"""Compare one epoch of SFT with LLaMA-Factory as it comes.

    python3 -m venv /tmp/lf && /tmp/lf/bin/pip install torch==2.13.0 llamafactory==0.9.5
    # on a CPU these two cannot load; an empty module stands for the second
    /tmp/lf/bin/pip uninstall -y torchvision torchaudio
    touch $(/tmp/lf/bin/python -c 'import site; print(site.getsitepackages()[0])')/torchaudio.py
    python -m perf.llama_factory --python /tmp/lf/bin/python [--rows 64] [--batch 8] [--repeats 1]

Needs models/base and data/raw/sft (`dvc repro fetch_model fetch_sft_data`) and a quiet machine. Rows, model,
precision and optimizer steps are the same: LoRA on an unquantized base in float32, which both can do on a
CPU. LLaMA-Factory tokenizes by itself, with its ChatML template. Seconds are those of the optimizer steps,
and of its trainer's whole loop.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from perf import sft
from perf.beside import ROOT, measured


def theirs(arguments: argparse.Namespace, folder: Path) -> dict:
    settings = sft.settings_of(arguments)
    rows = pq.read_table(folder / "raw_sft" / "alpaca_demo.parquet").slice(0, arguments.rows).to_pylist()
    data = folder / "lf_data"
    data.mkdir(exist_ok=True)
    (data / "rows.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    base = folder / "base"
    base.mkdir(exist_ok=True)
    for file in (ROOT / "models/base").iterdir():
        (base / file.name).symlink_to(file)
    # it computes in the type that stands there
    (base / "config.json").unlink()
    (base / "config.json").write_text(
        json.dumps(json.loads((ROOT / "models/base/config.json").read_text()) | {"dtype": "float32"})
    )
    config = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(base),
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": settings.lora.r,
        "lora_alpha": settings.lora.alpha,
        "lora_dropout": settings.lora.dropout,
        "template": "chatml",
        "dataset": "rows",
        "dataset_dir": str(data),
        "cutoff_len": settings.tokenize.sft.max_length,
        "per_device_train_batch_size": arguments.batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "learning_rate": settings.sft.learning_rate,
        "lr_scheduler_type": settings.sft.lr_scheduler,
        "warmup_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": str(folder / "lf"),
        "overwrite_output_dir": True,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
    }
    # JSON is YAML, in which "no" stays a text
    (folder / "lf.yaml").write_text(json.dumps(config))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "DISABLE_VERSION_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    subprocess.run(
        [arguments.python, "-m", "llamafactory.cli", "train", str(folder / "lf.yaml")],
        cwd=folder,
        env=environment,
        check=True,
        stdout=sys.stderr,
    )
    state = json.loads((folder / "lf" / "trainer_state.json").read_text())["log_history"]
    return {
        "seconds": state[-1]["train_runtime"],
        "tokens": 0,
        "losses": [entry["loss"] for entry in state if "loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="of an environment that has llamafactory")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype, arguments.quantization = "float32", "none"
    if arguments.folder:
        print(json.dumps(theirs(arguments, arguments.folder)))
        return
    flags = [f"--rows={arguments.rows}", f"--batch={arguments.batch}"]
    own = [*flags, "--quantization=none"]
    total = {"ours": 0.0, "theirs": 0.0}
    (ROOT / ".dvc" / "tmp").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / ".dvc" / "tmp") as name:
        folder = Path(name)
        measured("perf.sft", [*own, "--side=prepare", f"--folder={folder}"], folder)
        print("side seconds peak_MiB losses")
        for _ in range(arguments.repeats):
            for side, module, given in (
                ("ours", "perf.sft", [*own, "--side=ours"]),
                ("theirs", "perf.llama_factory", [*flags, f"--python={arguments.python}"]),
            ):
                one = measured(module, [*given, f"--folder={folder}"], folder)
                total[side] += one["seconds"]
                print(
                    f"{side} {one['seconds']:.1f} {one['peak_mib']:.0f} "
                    f"{' '.join(f'{loss:.3f}' for loss in one['losses'])}",
                    flush=True,
                )
    print(f"seconds: {total['ours'] / total['theirs']:.3f} of LLaMA-Factory's")


if __name__ == "__main__":
    main()
