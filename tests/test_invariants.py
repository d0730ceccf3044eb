"""The first steps of the real stages give the losses and gradient norms that are written down: a change of the arithmetic does not go unseen.

    python -m tests.test_invariants      write down what they are now, for a change that is meant to move them
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from stages import params
from stages.records import write_json
from tests import steps, tiny
from tests.conftest import changed

WRITTEN = Path(__file__).with_name("invariants.json")
CASES = {
    "lora": {"model.quantization": "none"},
    "qlora": {"model.quantization": "nf4", "lora.dropout": 0.1, "sft.gradient_checkpointing": True},
    "full": {"model.quantization": "none", "lora.method": "full"},
}
TOLERANCE = 2e-3
"""Of a value's size: another CPU rounds otherwise."""


def found(folder: Path, world: Path, case: str) -> dict[str, list[dict[str, float]]]:
    settings = changed(params.load(world / "params.yaml"), CASES[case] | {"sft.epochs": 3.0, "dpo.steps": 4})
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
    expected = json.loads(WRITTEN.read_text())[case]
    for stage, rows in found(tmp_path, world, case).items():
        assert len(rows) == len(expected[stage])
        for row, other in zip(rows, expected[stage], strict=True):
            assert row == pytest.approx(other, rel=TOLERANCE), stage


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tiny.make_world(Path(folder))
        write_json(WRITTEN, {case: found(Path(folder) / case, Path(folder), case) for case in CASES})
    sys.exit(f"written: {WRITTEN}")
