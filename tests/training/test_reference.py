"""The reference log-probs do not depend on how many pairs are computed at once."""

from reprotune.records import read_parquet
from tests import steps
from tests.conftest import changed
from tests.tiny import alpaca_rows, preference_rows


def test_batches_change_nothing(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    steps.sft(settings, model, tmp_path)
    steps.tokenize_dpo(settings, model, preference_rows(), tmp_path)
    by_size = []
    for size in (1, 5):
        steps.reference(changed(settings, {"reference.batch_size": size}), model, tmp_path)
        by_size.append(read_parquet(tmp_path / "reference" / "train.parquet").to_pylist())
    for alone, batched in zip(*by_size, strict=True):
        assert alone.keys() == {"ref_chosen_logps", "ref_rejected_logps"}
        assert all(abs(alone[key] - batched[key]) < 1e-3 for key in alone)
