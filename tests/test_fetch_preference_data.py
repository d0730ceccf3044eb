"""The preference pairs of the real package, which all fit their format."""

from stages import params, tables
from stages.formats import to_pair
from stages.records import read_parquet
from tests.tiny import ROOT


def test_every_pair_of_the_package_is_a_prompt_and_two_answers(tmp_path):
    tables.fetch_tables(params.load(ROOT / "params.yaml").data.preferences.sources, tmp_path)
    rows = read_parquet(tmp_path / "dpo_demo.parquet").to_pylist()
    assert len(rows) == 300 and sorted(rows[0]) == ["chosen", "conversations", "rejected"]
    for row in rows:
        prompt, chosen, rejected = to_pair(row, "sharegpt")
        assert prompt[-1]["role"] == "user" and chosen["role"] == rejected["role"] == "assistant"
