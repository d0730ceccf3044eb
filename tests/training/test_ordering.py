"""The order of rows: epochs, and within a batch by length."""

import datasets

from reprotune.training import ordering


def test_every_epoch_has_all_rows_in_another_order():
    rows = datasets.Dataset.from_dict(
        {"number": list(range(6)), "ids": [[0] * (1 + n % 4) for n in range(6)]}
    )
    drawn = ordering.batches(rows, ["ids"], 7, 3, 1)
    numbers = drawn["number"][:]
    assert len(numbers) == 21 and numbers == ordering.batches(rows, ["ids"], 7, 3, 1)["number"][:]
    epochs = [numbers[start : start + 6] for start in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    for start in range(0, 21, 3):
        lengths = [len(ids) for ids in drawn["ids"][start : start + 3]]
        assert lengths == sorted(lengths, reverse=True)
