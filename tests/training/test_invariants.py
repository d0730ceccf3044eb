"""The first steps of sft and dpo have the losses and gradient norms in invariants.json, within rounding.

`python -m tests.training.test_invariants` writes that file anew, after a change that is meant to move them.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from reprotune import params_file
from reprotune.records import write_json
from tests import steps, tiny
from tests.conftest import changed

INVARIANTS = Path(__file__).with_name("invariants.json")
CASES = {
    "lora": {"model.quantization": "none"},
    "qlora": {"model.quantization": "nf4", "lora.dropout": 0.1, "sft.gradient_checkpointing": True},
    "full": {"model.quantization": "none", "lora.method": "full"},
}
TOLERANCE = 2e-3
"""Relative: CPUs round differently."""


def first_steps(folder: Path, world: Path, case: str) -> dict[str, list[dict[str, float]]]:
    values = CASES[case] | {"sft.epochs": 3.0, "dpo.steps": 4}
    settings = changed(params_file.load(world / "params.yaml"), values)
    base = world / "tiny" / "model"
    steps.all_of_training(settings, base, folder)
    curves = {}
    for stage in ("sft", "dpo"):
        header, *lines = [line.split(",") for line in (folder / f"{stage}.csv").read_text().splitlines()]
        rows = [dict(zip(header, map(float, line), strict=True)) for line in lines]
        curves[stage] = [{key: row[key] for key in ("loss", "grad_norm")} for row in rows]
    return curves


@pytest.mark.parametrize("case", CASES)
def test_the_first_steps_are_as_written_down(case, world, tmp_path):
    expected = json.loads(INVARIANTS.read_text())[case]
    for stage, rows in first_steps(tmp_path, world, case).items():
        assert len(rows) == len(expected[stage])
        for row, expected_row in zip(rows, expected[stage], strict=True):
            assert row == pytest.approx(expected_row, rel=TOLERANCE), stage


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tiny.make_world(Path(folder))
        write_json(INVARIANTS, {case: first_steps(Path(folder) / case, Path(folder), case) for case in CASES})
    sys.exit(f"written: {INVARIANTS}")
