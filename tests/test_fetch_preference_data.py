"""The preference pairs of the real package, which all fit their format."""

from stages import params, sources
from stages.chat import conversations, sharegpt
from stages.records import read_parquet
from tests.tiny import ROOT


def test_every_pair_of_the_package_is_a_prompt_and_two_answers(tmp_path):
    sources.fetch_tables(params.load(ROOT / "params.yaml").data.preferences, tmp_path)
    file = tmp_path / "dpo_demo.parquet"
    rows = read_parquet(file).to_pylist()
    assert len(rows) == 300 and sorted(rows[0]) == ["chosen", "conversations", "rejected"]
    for prompt, chosen, rejected in conversations(rows, sharegpt, file):
        assert prompt[-1]["role"] == "user" and chosen["role"] == rejected["role"] == "assistant"
