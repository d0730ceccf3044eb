"""The instruction rows of the real package."""

from stages import params, tables
from stages.records import read_parquet
from tests.tiny import ROOT


def test_every_row_of_the_package_with_its_own_columns(tmp_path):
    tables.fetch_tables(params.load(ROOT / "params.yaml").data.sft.sources, tmp_path)
    table = read_parquet(tmp_path / "alpaca_demo.parquet")
    assert (table.num_rows, sorted(table.column_names)) == (999, ["input", "instruction", "output"])
    assert table.slice(1, 1).to_pylist()[0]["output"] == "The car accelerated rapidly."
