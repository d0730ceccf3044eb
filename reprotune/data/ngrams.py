"""Word n-grams that two texts share, found by hash and confirmed word by word."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

SHORT = 8
"""Words of an n-gram that counts towards coverage (Tülu 3, https://arxiv.org/abs/2411.15124, section 3.2)."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd multiplier of the rolling hash, modulo 2^64. A collision costs a comparison, never a wrong match."""


class Overlap(NamedTuple):
    """What a document shares with another text."""

    coverage: float
    """Part of the document's words that lie in shared SHORT-grams."""
    longest: int
    """Words of the longest shared run."""


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def hashes(numbers: np.ndarray) -> np.ndarray:
    """A hash for each run of SHORT word numbers, uint64 of shape (max(0, len - SHORT + 1),)."""
    count = max(0, len(numbers) - SHORT + 1)
    result = np.zeros(count, np.uint64)
    numbers = numbers.astype(np.uint64)
    for offset in range(SHORT):
        result = result * MULTIPLIER + numbers[offset : offset + count]
    return result


class Index:
    """The SHORT-grams of all documents, by hash. A document is an array of word numbers."""

    def __init__(self, documents: Sequence[np.ndarray]) -> None:
        grams = [hashes(document) for document in documents]
        flat = np.concatenate([np.zeros(0, np.uint64), *grams])
        owner = np.repeat(np.arange(len(documents)), [len(own_grams) for own_grams in grams])
        order = np.argsort(flat, kind="stable")
        self.sorted, self.owner = flat[order], owner[order]

    def hits(self, grams: np.ndarray) -> np.ndarray:
        """Places in `grams` whose hash is in the index."""
        if not len(self.sorted):
            return np.zeros(0, np.int64)
        places = np.searchsorted(self.sorted, grams)
        return np.flatnonzero(self.sorted[np.minimum(places, len(self.sorted) - 1)] == grams)

    def owners(self, gram: np.uint64) -> np.ndarray:
        """Documents that have a gram of this hash."""
        first, end = (np.searchsorted(self.sorted, gram, side) for side in ("left", "right"))
        return self.owner[first:end]


def candidates(index: Index, numbers: np.ndarray, row_of: np.ndarray) -> Iterator[tuple[int, int, list[int]]]:
    """Every pair of a row and a document that share the hash of a gram, and the places of these grams.

    Args:
        numbers: word numbers of all rows, shape (words,).
        row_of: the row of each word, shape (words,).

    Yields:
        (row, document, places in `numbers`).
    """
    places_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    grams = hashes(numbers)
    for place in map(int, index.hits(grams)):
        for document in set(map(int, index.owners(grams[place]))):
            places_of[int(row_of[place]), document].append(place)
    for (row, document), places in places_of.items():
        yield row, document, places


def overlap(document: np.ndarray, numbers: np.ndarray, places: Sequence[int]) -> Overlap:
    """What a document shares with `numbers`, compared word by word at `places`, which ascend."""
    starts_of: dict[bytes, list[int]] = defaultdict(list)
    for start in range(len(document) - SHORT + 1):
        starts_of[document[start : start + SHORT].tobytes()].append(start)
    covered = np.zeros(len(document), bool)
    # by diagonal (place - start): the last shared gram, and the length of the run that ends with it
    runs: dict[int, tuple[int, int]] = {}
    longest = 0
    for place in places:
        for start in starts_of.get(numbers[place : place + SHORT].tobytes(), ()):
            covered[start : start + SHORT] = True
            last, length = runs.get(place - start, (-2, 0))
            length = length + 1 if last == place - 1 else SHORT
            runs[place - start] = place, length
            longest = max(longest, length)
    return Overlap(float(covered.mean()), longest)
