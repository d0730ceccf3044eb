"""No row and no token is lost from the account."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages import InputError, ledger
from stages.records import read_parquet


@st.composite
def rows(draw) -> ledger.Rows:
    """Rows of one to three sources with any reasons; kept ones are held out or seen once or more."""
    sources = draw(st.integers(1, 3))
    count = draw(st.integers(1, 40))

    def column(values: st.SearchStrategy) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=count, max_size=count)))

    source = np.sort(column(st.integers(0, sources - 1)))
    reason = column(st.sampled_from([ledger.KEPT, *(code for code in range(len(ledger.REASONS)) if code not in (ledger.KEPT, ledger.OVER_LIMIT))]))
    tokens = np.where(reason == ledger.INVALID, 0, column(st.integers(2, 500)))
    kept = reason == ledger.KEPT
    kept_tokens = np.where(kept, np.minimum(tokens, column(st.integers(2, 500))), 0)
    seen = np.where(kept, column(st.integers(0, 3)), 0)
    taken = np.bincount(source, minlength=sources)
    return ledger.Rows(
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


LEAVING = [name for code, name in enumerate(ledger.REASONS) if code != ledger.KEPT]


@given(found=rows())
def test_raw_is_kept_plus_every_reason_for_leaving(found):
    record = ledger.account(found)
    for part in [*record["total"], *record["sources"]]:
        assert part["rows"]["raw"] == part["rows"]["train"] + part["rows"]["held_out"] + sum(part["rows"][name] for name in LEAVING)
        tokens = part["tokens"]
        assert tokens["raw"] == sum(value for name, value in tokens.items() if name not in ("raw", "with_labels", "seen"))
    for table in ("rows", "tokens"):
        for key, value in record["total"][0][table].items():
            assert value == sum(part[table][key] for part in record["sources"])
    assert record["total"][0]["rows"]["raw"] == sum(found.raw)
    assert record["total"][0]["rows"]["seen"] == found.seen.sum()


@given(found=rows())
def test_every_row_that_left_is_listed_once_with_its_reason(found, tmp_path_factory):
    file = tmp_path_factory.mktemp("dropped") / "dropped.parquet"
    ledger.write_dropped(found, file)
    listed = read_parquet(file).to_pylist()
    expected = [(found.names[s], n, ledger.REASONS[r]) for s, n, r in zip(found.source, found.number, found.reason, strict=True) if r != ledger.KEPT]
    assert [(row["source"], row["row"], row["reason"]) for row in listed] == expected


@given(found=rows(), budget=st.floats(0, 1))
def test_the_budget_is_kept_or_names_the_first_rows(found, budget):
    left = np.isin(found.reason, ledger.BUDGETED)
    over = [index for index in range(len(found.names)) if left[found.source == index].sum() > budget * (found.source == index).sum()]
    if not over:
        assert ledger.check_budget(found, "tokenize.sft", budget) == left.mean()
        return
    own = found.source == over[0]
    dropped = int((left & own).sum())
    with pytest.raises(InputError) as error:
        ledger.check_budget(found, "tokenize.sft", budget)
    message = str(error.value)
    assert f"tokenize.sft.max_dropped: {dropped} of {own.sum()} rows of {found.names[over[0]]} (" in message
    first = int(np.flatnonzero(left & own)[0])
    assert f"{found.files[found.source[first]]}, row {found.number[first]}: {ledger.REASONS[found.reason[first]]}: because" in message
    assert message.count(": because") == min(dropped, ledger.SHOWN)
