"""The account: every row and every token is in it once, and the budget is kept."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reprotune.data import accounting
from reprotune.data.accounting import Reason
from reprotune.errors import InputError
from reprotune.records import read_parquet


@st.composite
def rows(draw) -> accounting.Rows:
    """Rows of one to three sources with any reasons; kept ones are held out or seen once or more."""
    sources = draw(st.integers(1, 3))
    count = draw(st.integers(1, 40))

    def column(values: st.SearchStrategy) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=count, max_size=count)))

    source = np.sort(column(st.integers(0, sources - 1)))
    reason = column(st.sampled_from([code for code in Reason if code != Reason.OVER_LIMIT]))
    tokens = np.where(reason == Reason.INVALID, 0, column(st.integers(2, 500)))
    kept = reason == Reason.KEPT
    kept_tokens = np.where(kept, np.minimum(tokens, column(st.integers(2, 500))), 0)
    seen = np.where(kept, column(st.integers(0, 3)), 0)
    taken = np.bincount(source, minlength=sources)
    return accounting.Rows(
        names=[f"s{index}" for index in range(sources)],
        files=[Path(f"raw/s{index}.parquet") for index in range(sources)],
        raw=[int(number) + draw(st.integers(0, 9)) for number in taken],
        source=source,
        number=np.concatenate([np.arange(number) for number in taken]),
        reason=reason.astype(np.uint8),
        details={int(index): "because" for index in np.flatnonzero(~kept)},
        tokens=tokens,
        kept_tokens=kept_tokens,
        label_tokens=kept_tokens // 2,
        seen=seen,
    )


LEAVING = [reason.key for reason in Reason if reason != Reason.KEPT]


@given(taken=rows())
def test_raw_is_kept_plus_every_reason_for_leaving(taken):
    record = accounting.account(taken)
    (total,) = record["total"]
    for part in [total, *record["sources"]]:
        counts, tokens = part["rows"], part["tokens"]
        assert counts["raw"] == sum(counts[name] for name in ("train", "held_out", *LEAVING))
        apart = ("raw", "with_labels", "seen")
        assert tokens["raw"] == sum(value for name, value in tokens.items() if name not in apart)
    for table in ("rows", "tokens"):
        for key, value in total[table].items():
            assert value == sum(part[table][key] for part in record["sources"])
    assert total["rows"]["raw"] == sum(taken.raw)
    assert total["rows"]["seen"] == taken.seen.sum()


@given(taken=rows())
def test_every_row_that_left_is_listed_once_with_its_reason(taken, tmp_path_factory):
    file = tmp_path_factory.mktemp("dropped") / "dropped.parquet"
    accounting.write_dropped(taken, file)
    listed = read_parquet(file).to_pylist()
    expected = [
        (taken.names[source], number, Reason(reason).key)
        for source, number, reason in zip(taken.source, taken.number, taken.reason, strict=True)
        if reason != Reason.KEPT
    ]
    assert [(row["source"], row["row"], row["reason"]) for row in listed] == expected


@given(taken=rows(), budget=st.floats(0, 1))
def test_the_budget_is_kept_or_names_the_first_rows(taken, budget):
    budgeted = np.isin(taken.reason, accounting.BUDGETED)
    over = [
        index
        for index in range(len(taken.names))
        if budgeted[taken.source == index].sum() > budget * (taken.source == index).sum()
    ]
    if not over:
        assert accounting.check_budget(taken, "tokenize.sft", budget) == budgeted.mean()
        return
    in_source = taken.source == over[0]
    dropped = np.flatnonzero(budgeted & in_source)
    with pytest.raises(InputError) as error:
        accounting.check_budget(taken, "tokenize.sft", budget)
    message = str(error.value)
    name = taken.names[over[0]]
    assert f"tokenize.sft.max_dropped: {len(dropped)} of {in_source.sum()} rows of {name} (" in message
    where = f"{taken.files[over[0]]}, row {taken.number[dropped[0]]}"
    assert f"{where}: {Reason(taken.reason[dropped[0]]).key}: because" in message
    assert message.count(": because") == min(len(dropped), accounting.LISTED_IN_ERRORS)
