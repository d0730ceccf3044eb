"""Which of the tokenized rows are trained on and which held out: contaminated ones and duplicates leave, the seed draws the rest."""

import zlib
from pathlib import Path

import numpy as np

from stages import InputError, duplicates, ledger
from stages.params import PreferencesData, SftData, Tokenize
from stages.records import read_parquet


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose, so that drawing more or fewer for it changes no other draw."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def leave_contaminated(rows: ledger.Rows, folder: Path, data: str) -> None:
    found: dict[tuple[str, int], str] = {}
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(f"{folder}: no *.parquet, expected a file for each benchmark; `dvc repro contamination` makes them")
    for file in files:
        for match in read_parquet(file).to_pylist():
            if match["data"] == data:
                found.setdefault((match["source"], match["row"]), f"holds row {match['doc_id']} of {file.stem}")
    details = {
        index: found[key]
        for index in map(int, np.flatnonzero(rows.reason == ledger.KEPT))
        if (key := (rows.names[rows.source[index]], int(rows.number[index]))) in found
    }
    rows.leave(np.array(list(details), np.int64), ledger.CONTAMINATED, details)


def leave_duplicates(rows: ledger.Rows, section: Tokenize, digests: np.ndarray, signatures: np.ndarray) -> None:
    searches = []
    if section.deduplicate.exact:
        searches.append((ledger.DUPLICATE, lambda kept: duplicates.exact(digests[kept]), "the text of"))
    if (threshold := section.deduplicate.near) is not None:
        searches.append((ledger.NEAR_DUPLICATE, lambda kept: duplicates.near(signatures[kept], threshold), "nearly the text of"))
    for reason, search, words in searches:
        kept = np.flatnonzero(rows.reason == ledger.KEPT)
        first = kept[search(kept)]
        again = first != kept
        details = {int(index): f"{words} {rows.where(other)}" for index, other in zip(kept[again], first[again], strict=True)}
        rows.leave(kept[again], reason, details)


def draw(rows: ledger.Rows, data: SftData | PreferencesData, section: Tokenize, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decide what each kept row is for: indices to train on, shuffled, as often as they are seen, and held-out ones in order."""
    kept = np.flatnonzero(rows.reason == ledger.KEPT)
    if section.held_out >= len(kept):
        ledger.check_budget(rows, name, section.max_dropped)
        raise InputError(
            f"{name}.held_out: {len(kept)} of {len(rows.reason)} rows are kept, expected more than the {section.held_out} to hold out; "
            f"lower held_out, or raise `limit` in data or max_length{ledger.first_left_out(rows, np.flatnonzero(rows.reason != ledger.KEPT))}"
        )
    held_out = np.sort(generator(seed, "held out").permutation(kept)[: section.held_out])
    train = np.setdiff1d(kept, held_out)
    for index, source in enumerate(rows.names):
        weight = data.mix[source].weight
        own = train[rows.source[train] == index]
        rows.seen[own] = int(weight)
        rows.seen[generator(seed, f"weight {source}").permutation(own)[: round((weight - int(weight)) * len(own))]] += 1
    unseen = train[rows.seen[train] == 0]
    rows.leave(unseen, ledger.NOT_DRAWN, {int(index): f"the weight of {rows.names[rows.source[index]]} is below 1" for index in unseen})
    order = generator(seed, "order").permutation(np.repeat(train, rows.seen[train]))
    if len(order) == 0:
        raise InputError(f"{name}: no row is left to train on; raise the weights in data, or `limit`")
    return order, held_out
