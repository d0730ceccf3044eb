"""What the stages before `report` leave, written by hand, and the report made from it."""

from pathlib import Path
from typing import Any

from reprotune import params, params_file
from reprotune.records import write_csv, write_metrics
from reprotune.report import report
from tests.comparison.cells import summarize, write_scores
from tests.conftest import changed
from tests.tiny import ROOT

TEMPLATES = ROOT / "templates" / "report"
CONTAMINATED = (3,)
"""The `doc_id` of each benchmark's contaminated rows."""
SFT = {
    "steps": 5,
    "tokens": 1234,
    "measured": [
        {"measure": "loss", "rows": "held-out rows", "n": 99, "unit": "tokens", "before": 2.0, "after": 1.5}
    ],
}
DPO = {
    "steps": 3,
    "tokens": 55,
    "measured": [
        {
            "measure": "reward accuracy",
            "rows": "held-out pairs",
            "n": 4,
            "unit": "pairs",
            "before": 0.5,
            "after": 0.75,
        }
    ],
}
COUNTS = {
    "raw": 20,
    "over_limit": 2,
    "invalid": 1,
    "no_preference": 0,
    "overlong": 3,
    "without_labels": 0,
    "contaminated": 0,
    "duplicate": 1,
    "near_duplicate": 1,
    "not_drawn": 0,
    "held_out": 2,
    "train": 10,
}
SOURCE = {"source": "rows", "rows": COUNTS, "tokens": {"train": 1234}}
DATA = {
    "sources": [SOURCE],
    "shards": [{"part": "train", "rows": 3, "tokens": 1234, "filled": 0.9}],
}
MERGED = {"kl": 1e-4, "agreement": 0.99, "n": 1827, "scored_kl": 0.27, "scored_agreement": 0.77}
CURVES = {
    "sft": ["loss"],
    "sft_held_out": ["loss"],
    "dpo": ["loss", "reward_margin", "logps_chosen", "logps_rejected"],
    "dpo_held_out": ["loss", "reward_margin", "chosen_log_prob", "rejected_log_prob"],
}


def unquantized(world: Path, **values: Any) -> params.Params:
    """The tiny params as the fixture `settings` has them, with other values in `report`."""
    settings = params_file.load(world / "params.yaml")
    report_values = {f"report.{key}": value for key, value in values.items()}
    return changed(settings, {"model.quantization": "none", **report_values})


def write_run(settings: params.Params, folder: Path) -> Path:
    """Write a run in which GSM8K gains with DPO, and every other benchmark has as many rows better as worse.

    Returns:
        Its metrics folder.
    """
    for name in settings.evaluate.benchmarks:
        dpo = [1] * 40 if name == "gsm8k" else [0, 1] * 20
        correct = {"base": [1, 0] * 20, "sft": [1, 0] * 20, "dpo": dpo}
        write_scores(folder, name, correct, CONTAMINATED)
    summarize(settings, folder)
    metrics = folder / "metrics"
    write_metrics(metrics / "train" / "sft.json", {}, SFT)
    write_metrics(metrics / "train" / "dpo.json", {}, DPO)
    for name in ("sft", "dpo"):
        write_metrics(metrics / "data" / f"{name}.json", {"rows": 10}, DATA)
    benchmarks = [
        {"benchmark": name, "rows": 1000, "rows_contaminated": 1, "rows_with_13_gram": 1, "rows_too_short": 7}
        for name in settings.evaluate.benchmarks
    ]
    training = [{"source": "sft.rows", "rows": 20, "rows_contaminated": 1}]
    write_metrics(
        metrics / "data" / "contamination.json", {}, {"benchmarks": benchmarks, "training": training}
    )
    write_metrics(metrics / "merge.json", {}, MERGED)
    for name, columns in CURVES.items():
        rows = [{"step": step, **dict.fromkeys(columns, 1.0 / step)} for step in (1, 2, 3)]
        write_csv(folder / "plots" / f"{name}.csv", rows, ["step", *columns])
    return metrics


def make_report(settings: params.Params, metrics: Path, out: Path) -> None:
    """Run `report` on what `write_run` wrote."""
    folder = metrics.parent
    lock = ROOT / "requirements.lock"
    report.run(settings, metrics, folder / "evals", folder / "plots", TEMPLATES, lock, out)
