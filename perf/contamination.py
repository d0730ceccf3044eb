"""Search all five benchmarks for as many training rows as Alpaca has, on one core.

    python -m perf.contamination [ROWS]

Needs data/raw (`dvc repro fetch_sft_data fetch_benchmark`). Prints seconds and peak resident memory in MiB.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from perf.beside import ROOT
from perf.tokenize import synthetic
from reprotune import params_file
from reprotune.data import contamination
from tests.conftest import changed

ALPACA = 52_002


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=int, nargs="?", default=ALPACA)
    rows = parser.parse_args().rows
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    settings = params_file.load(ROOT / "params.yaml")
    with tempfile.TemporaryDirectory(dir=ROOT / ".dvc" / "tmp") as folder:
        raw = Path(folder) / "raw"
        (raw / "sft").mkdir(parents=True)
        for name in ("benchmarks", "preferences"):
            (raw / name).symlink_to(ROOT / "data" / "raw" / name)
        synthetic("sft", rows, raw / "sft" / "rows.parquet", conversational=False)
        entry = {
            "format": "alpaca",
            "ignore": [],
            "source": {"kind": "local", "path": "-", "sha256": "0" * 64},
        }
        settings = changed(
            settings,
            {"data.sft.sources": {"rows": entry}, "data.sft.mix": {"rows": {"limit": None, "weight": 1.0}}},
        )
        begin = time.monotonic()
        contamination.run(
            settings,
            argparse.Namespace(raw=raw, out=Path(folder) / "out", metrics=Path(folder) / "metrics.json"),
        )
        seconds = time.monotonic() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"rows": rows, "seconds": round(seconds, 1), "peak_mib": round(peak)}))


if __name__ == "__main__":
    main()
