"""Which rows of a benchmark are scored."""

from reprotune.evaluation import harness, rows
from reprotune.records import read_parquet
from tests.conftest import changed
from tests.evaluation.known import Known


def test_a_limit_draws_by_seed_and_not_the_first_rows(data, settings):
    name = "winogrande"
    file = data / name / "validation.parquet"
    drawn = {seed: rows.subset(file, name, 5, seed) for seed in range(20)}
    assert all(numbers == sorted(set(numbers)) and len(numbers) == 5 for numbers in drawn.values())
    assert len({tuple(numbers) for numbers in drawn.values()}) > 10
    assert drawn[3] == rows.subset(file, name, 5, 3)
    benchmark = changed(settings, {"benchmarks.winogrande.limit": 5}).benchmarks[name]
    _, samples, _ = harness.score(Known(name, set(range(12))), name, benchmark, data / name, seed=3)
    assert [row["doc_id"] for row in samples] == drawn[3]
    table = read_parquet(file).to_pylist()
    for sample in samples:
        assert table[sample["doc_id"]]["sentence"] in sample["doc"].replace('\\"', '"')
