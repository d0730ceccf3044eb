"""The stages of a run as functions on one folder, for tests that need some of them."""

from argparse import Namespace
from pathlib import Path

from stages import params
from stages.records import read_json, read_parquet, write_parquet
from tests.tiny import ROOT

TEMPLATES = ROOT / "templates"
CONFIGS = ROOT / "configs"


def tokenize_sft(settings: params.Params, base: Path, rows: list[dict], folder: Path, processes: int = 1) -> dict:
    from stages import tokenize_sft

    write_parquet(folder / "raw_sft" / "rows.parquet", rows)
    tokenize_sft.run(settings, tokenize_paths(base, folder, "sft"), processes)
    return account(folder / "sft_data.json")


def tokenize_dpo(settings: params.Params, base: Path, rows: list[dict], folder: Path, processes: int = 1) -> dict:
    from stages import tokenize_dpo

    write_parquet(folder / "raw_dpo" / "pairs.parquet", rows)
    tokenize_dpo.run(settings, tokenize_paths(base, folder, "dpo"), processes)
    return account(folder / "dpo_data.json")


def account(file: Path) -> dict:
    """A ledger's lists by name."""
    record = read_json(file)
    (total,) = record["total"]
    return record | {"total": total, **{key: {row[name]: row for row in record[key]} for key, name in (("sources", "source"), ("shards", "part"))}}


def dropped(folder: Path, name: str = "sft") -> list[tuple[int, str, str]]:
    return [(row["row"], row["reason"], row["detail"]) for row in read_parquet(folder / f"{name}_dropped.parquet").to_pylist()]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def measured(metrics: dict) -> dict[tuple[str, str], dict]:
    """A training stage's measurements by (rows, measure)."""
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
    from stages import sft

    sft.run(settings, Namespace(base=base, data=folder / "sft_tokens", templates=TEMPLATES, out=folder / "sft", **training(folder, "sft")))
    return read_json(folder / "sft.json")


def reference(settings: params.Params, base: Path, folder: Path) -> None:
    from stages import reference

    reference.run(settings, Namespace(base=base, adapter=folder / "sft", data=folder / "dpo_tokens", templates=TEMPLATES, configs=CONFIGS, checkpoints=folder / "checkpoints", out=folder / "reference"))


def dpo(settings: params.Params, base: Path, folder: Path) -> dict:
    from stages import dpo

    paths = Namespace(base=base, adapter=folder / "sft", data=folder / "dpo_tokens", reference=folder / "reference", templates=TEMPLATES)
    dpo.run(settings, Namespace(**vars(paths), out=folder / "dpo", **training(folder, "dpo")))
    return read_json(folder / "dpo.json")


def all_of_training(settings: params.Params, base: Path, folder: Path) -> None:
    """On the tiny rows: tokenizing, sft, reference and dpo."""
    from tests import tiny

    tokenize_sft(settings, base, tiny.alpaca_rows(), folder)
    tokenize_dpo(settings, base, tiny.preference_rows(), folder)
    sft(settings, base, folder)
    reference(settings, base, folder)
    dpo(settings, base, folder)


def training_rows(folder: Path):
    from stages import training

    return training.shards(folder / "sft_tokens", "train")


def training(folder: Path, name: str) -> dict[str, Path]:
    own = {"configs": CONFIGS, "checkpoints": folder / "checkpoints"}
    return own | {"metrics": folder / f"{name}.json", "plots": folder}
