"""The reference log-probs do not depend on how many pairs are computed at once."""

from stages.records import read_parquet
from tests import steps
from tests.conftest import changed
from tests.tiny import alpaca_rows, preference_rows


def test_batches_change_nothing(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    steps.sft(settings, model, tmp_path)
    steps.tokenize_dpo(settings, model, preference_rows(), tmp_path)
    found = []
    for size in (1, 5):
        steps.reference(changed(settings, {"reference.batch_size": size}), model, tmp_path)
        found.append(read_parquet(tmp_path / "reference" / "train.parquet").to_pylist())
    for one, other in zip(*found, strict=True):
        assert all(abs(one[key] - other[key]) < 1e-3 for key in ("ref_chosen_logps", "ref_rejected_logps"))
