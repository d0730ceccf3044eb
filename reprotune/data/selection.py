"""Which tokenized rows are left out as contaminated or duplicate, and which of the rest are trained on."""

import zlib
from collections.abc import Callable
from functools import reduce
from itertools import accumulate
from pathlib import Path

import numpy as np

from reprotune.data import duplicates
from reprotune.data.accounting import Reason, Rows, check_budget, first_left_out
from reprotune.errors import InputError
from reprotune.params import PreferencesData, SftData, Tokenize
from reprotune.records import read_parquet


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose: drawing more or fewer of them changes no other draw."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def leave_out_contaminated(rows: Rows, folder: Path, data: str) -> None:
    """Leave out the rows that `contamination` matched; `data` is their key in params.data."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(
            f"{folder}: no *.parquet, expected a file for each benchmark; "
            "`dvc repro contamination` makes them"
        )
    matched: dict[tuple[str, int], str] = {}
    for file in files:
        for match in read_parquet(file).to_pylist():
            if match["data"] == data:
                detail = f"holds row {match['doc_id']} of {file.stem}"
                matched.setdefault((match["source"], match["row"]), detail)
    details = {}
    for index in map(int, np.flatnonzero(rows.reason == Reason.KEPT)):
        key = (rows.names[rows.source[index]], int(rows.number[index]))
        if key in matched:
            details[index] = matched[key]
    rows.leave_out(np.array(list(details), np.int64), Reason.CONTAMINATED, details)


def leave_out_duplicates(rows: Rows, section: Tokenize, digests: np.ndarray, signatures: np.ndarray) -> None:
    """Leave out duplicates, then near-duplicates of the rows that stay, as far as `section` asks for it."""
    if section.deduplicate.exact:
        leave_out_repeated(
            rows, Reason.DUPLICATE, lambda kept: duplicates.exact(digests[kept]), "the text of"
        )
    if (threshold := section.deduplicate.near) is not None:
        leave_out_repeated(
            rows,
            Reason.NEAR_DUPLICATE,
            lambda kept: duplicates.near(signatures[kept], threshold),
            "nearly the text of",
        )


def leave_out_repeated(
    rows: Rows, reason: Reason, search: Callable[[np.ndarray], np.ndarray], words: str
) -> None:
    """Leave out kept rows that repeat another; `search` gives for each the place of the first one alike."""
    kept = np.flatnonzero(rows.reason == Reason.KEPT)
    first = kept[search(kept)]
    repeated = first != kept
    details = {
        int(index): f"{words} {rows.where(original)}"
        for index, original in zip(kept[repeated], first[repeated], strict=True)
    }
    rows.leave_out(kept[repeated], reason, details)


def group_by_prompt(rows: Rows, section: Tokenize, digests: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    """For each row the index of the first kept one with the same prompt; its own for a row that is left out.

    Where near-duplicates are left out, prompts that are nearly the same count as the same.
    """
    group = np.arange(len(rows.reason))
    kept = np.flatnonzero(rows.reason == Reason.KEPT)
    group[kept] = kept[duplicates.exact(digests[kept])]
    if (threshold := section.deduplicate.near) is not None:
        first = np.unique(group[kept])
        alike = np.arange(len(group))
        alike[first] = first[duplicates.near_groups(signatures[first], threshold)]
        group[kept] = alike[group[kept]]
    return group


def shared_prompts(rows: Rows, prompts: np.ndarray) -> list[dict[str, int]]:
    """How many prompts the kept rows have, and how many of these rows share theirs with another."""
    _, sizes = np.unique(prompts[rows.reason == Reason.KEPT], return_counts=True)
    return [{"distinct": len(sizes), "rows_that_share": int(sizes[sizes > 1].sum())}]


def hold_out(prompts: np.ndarray, order: np.ndarray, count: int, name: str) -> list[int]:
    """The first `count` rows in this order, with all rows that share a prompt with one of them.

    A prompt whose rows would make it impossible to reach `count` is passed over.

    Raises:
        InputError: no whole prompts add up to `count`.
    """
    members: dict[int, list[int]] = {}
    for index in order:
        members.setdefault(int(prompts[index]), []).append(int(index))
    # a dict keeps the order in which its keys came
    groups = list(members.values())
    sizes = [len(group) for group in groups]
    # what the groups from each one on can add up to, as far as `count`; none of them has one sum, 0
    sums = list(accumulate(reversed(sizes), lambda later, size: added(later, size, count), initial=1))
    if not sums[-1] >> count & 1:
        most = min(count + max(sizes), len(order) - 1)
        possible = reduce(lambda later, size: added(later, size, most), sizes, 1)
        near = [
            *[n for n in range(1, count) if possible >> n & 1][-1:],
            *[n for n in range(count + 1, most + 1) if possible >> n & 1][:1],
        ]
        expected = f"expected {' or '.join(map(str, near))}" if near else "but all rows have the same prompt"
        raise InputError(
            f"{name}.held_out: found {count}, {expected}: rows with the same prompt are held out together"
        )
    chosen: list[int] = []
    for group, later in zip(groups, reversed(sums[:-1]), strict=True):
        left = count - len(chosen) - len(group)
        if left >= 0 and later >> left & 1:
            chosen += group
    return chosen


def added(sums: int, size: int, most: int) -> int:
    """The sums with or without one more size, up to `most`; bit n of a set of sums says that n is one."""
    return (sums | sums << size) & ((1 << most + 1) - 1)


def draw(
    rows: Rows, prompts: np.ndarray, data: SftData | PreferencesData, section: Tokenize, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the held-out rows, and how often each other kept row is seen in an epoch.

    Args:
        prompts: for each row a number that rows with the same prompt share. No prompt is on both sides.

    Returns:
        Indices of the training rows, shuffled, each as often as it is seen; of the held-out rows, in order.
    """
    kept = np.flatnonzero(rows.reason == Reason.KEPT)
    if section.held_out >= len(kept):
        check_budget(rows, name, section.max_dropped)
        left_out = first_left_out(rows, np.flatnonzero(rows.reason != Reason.KEPT))
        raise InputError(
            f"{name}.held_out: {len(kept)} of {len(rows.reason)} rows are kept, "
            f"expected more than the {section.held_out} to hold out; "
            f"lower held_out, or raise `limit` in data or max_length{left_out}"
        )
    order = generator(seed, "held out").permutation(kept)
    held_out = np.sort(np.array(hold_out(prompts, order, section.held_out, name), np.int64))
    train = np.setdiff1d(kept, held_out)
    for index, source in enumerate(rows.names):
        in_source = train[rows.source[train] == index]
        weight = data.mix[source].weight
        rows.seen[in_source] = int(weight)
        shuffled = generator(seed, f"weight {source}").permutation(in_source)
        rows.seen[shuffled[: round((weight - int(weight)) * len(in_source))]] += 1
    unseen = train[rows.seen[train] == 0]
    details = {int(index): f"the weight of {rows.names[rows.source[index]]} is below 1" for index in unseen}
    rows.leave_out(unseen, Reason.NOT_DRAWN, details)
    order = generator(seed, "order").permutation(np.repeat(train, rows.seen[train]))
    if len(order) == 0:
        raise InputError(f"{name}: no row is left to train on; raise the weights in data, or `limit`")
    return order, held_out
