"""Stages as functions on one folder, for tests that need only part of the pipeline."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from reprotune import params
from reprotune.records import read_metrics, read_parquet, write_parquet
from tests.tiny import ROOT

if TYPE_CHECKING:
    import datasets

TEMPLATES = ROOT / "templates"
CONFIGS = ROOT / "configs"


def tokenize_sft(
    settings: params.Params, base: Path, rows: list[dict], folder: Path, processes: int = 1
) -> dict:
    from reprotune.data import packing, tokenizing

    write_parquet(folder / "raw_sft" / "rows.parquet", rows)
    pack = packing.packer(settings.tokenize.sft)
    tokenizing.instructions(settings, tokenize_paths(base, folder, "sft"), pack, processes)
    return account(folder / "sft_data.json")


def tokenize_dpo(
    settings: params.Params, base: Path, rows: list[dict], folder: Path, processes: int = 1
) -> dict:
    from reprotune.data import tokenizing

    write_parquet(folder / "raw_dpo" / "pairs.parquet", rows)
    tokenizing.preferences(settings, tokenize_paths(base, folder, "dpo"), processes)
    return account(folder / "dpo_data.json")


def account(file: Path) -> dict:
    """The metrics of a tokenize stage, with `sources` and `shards` as dicts by name."""
    record = read_metrics(file)
    (total,) = record["total"]
    return record | {
        "total": total,
        **{
            key: {row[name]: row for row in record[key]}
            for key, name in (("sources", "source"), ("shards", "part"))
        },
    }


def dropped(folder: Path, name: str = "sft") -> list[tuple[int, str, str]]:
    """The row, reason and detail of each dropped row."""
    return [
        (row["row"], row["reason"], row["detail"])
        for row in read_parquet(folder / f"{name}_dropped.parquet").to_pylist()
    ]


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of each file, by file name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def measured(metrics: dict) -> dict[tuple[str, str], dict]:
    """A training stage's measurements, by rows and measure."""
    return {(row["rows"], row["measure"]): row for row in metrics["measured"]}


def tokenize_paths(base: Path, folder: Path, name: str) -> Namespace:
    return Namespace(
        raw=folder / f"raw_{name}",
        base=base,
        templates=TEMPLATES,
        contamination=folder / "contamination",
        out=folder / f"{name}_tokens",
        dropped=folder / f"{name}_dropped.parquet",
        metrics=folder / f"{name}_data.json",
    )


def sft(settings: params.Params, base: Path, folder: Path) -> dict:
    from reprotune.training import sft

    sft.run(
        settings,
        Namespace(
            base=base,
            data=folder / "sft_tokens",
            templates=TEMPLATES,
            out=folder / "sft",
            **training(folder, "sft"),
        ),
    )
    return read_metrics(folder / "sft.json")


def reference(settings: params.Params, base: Path, folder: Path) -> None:
    from reprotune.training import reference

    reference.run(
        settings,
        Namespace(
            base=base,
            adapter=folder / "sft",
            data=folder / "dpo_tokens",
            templates=TEMPLATES,
            configs=CONFIGS,
            checkpoints=folder / "checkpoints",
            out=folder / "reference",
        ),
    )


def dpo(settings: params.Params, base: Path, folder: Path) -> dict:
    from reprotune.training import dpo

    paths = Namespace(
        base=base,
        adapter=folder / "sft",
        data=folder / "dpo_tokens",
        reference=folder / "reference",
        templates=TEMPLATES,
    )
    dpo.run(settings, Namespace(**vars(paths), out=folder / "dpo", **training(folder, "dpo")))
    return read_metrics(folder / "dpo.json")


def all_of_training(settings: params.Params, base: Path, folder: Path) -> None:
    """Tokenize the tiny rows, then sft, reference and dpo."""
    from tests import tiny

    tokenize_sft(settings, base, tiny.alpaca_rows(), folder)
    tokenize_dpo(settings, base, tiny.preference_rows(), folder)
    sft(settings, base, folder)
    reference(settings, base, folder)
    dpo(settings, base, folder)


def training_rows(folder: Path) -> "datasets.Dataset":
    from reprotune.data.shards import read_shards

    return read_shards(folder / "sft_tokens", "train")


def training(folder: Path, name: str) -> dict[str, Path]:
    """The paths that sft and dpo have in common."""
    return {
        "configs": CONFIGS,
        "checkpoints": folder / "checkpoints",
        "metrics": folder / f"{name}.json",
        "plots": folder,
        "measured": folder,
    }
