"""Rows whose text came before: the same text after normalization, or nearly the same by MinHash.

The first of several alike stays, in the order of the sources' names and of the rows in a source.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 128
"""Hash functions of a signature. The standard error of a Jaccard estimate is at most 1 / (2 √128) = 0.044."""
SHINGLE = 5
"""Words of a shingle, the unit that signatures compare."""
DIGEST_BYTES = 16
LOOKED_AT = 64
"""Signatures that are compared at once."""
RECALL = 0.99
"""Part of the pairs exactly at the threshold that the index must find."""


def normalized(texts: Sequence[str]) -> str:
    """The texts, separated by NUL, without differences in letter case, spacing and Unicode composition."""
    return "\0".join(" ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in texts)


def digest(text: str) -> bytes:
    """DIGEST_BYTES that stand for a normalized text."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def signature(text: str) -> np.ndarray:
    """MinHash values of the shingles of a normalized text, uint32 of shape (PERMUTATIONS,)."""
    words = re.findall(r"\w+", text) or [text]
    shingles = {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}
    minhash = MinHash(PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
    minhash.update_batch(shingle.encode() for shingle in sorted(shingles))
    return minhash.hashvalues


def exact(digests: np.ndarray) -> np.ndarray:
    """For each row the index of the first row with the same digest, which may be its own."""
    high, low = digests.view(np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    first = np.empty_like(order)
    # lexsort is stable, so the first of equal digests in `order` is also the first row
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


def bands(threshold: float) -> tuple[int, int]:
    """(bands, values in each) of the LSH index: as many values as leave RECALL at the threshold.

    More values let fewer pairs below the threshold through. A pair of similarity s shares a band with
    probability 1 - (1 - s^values)^bands (https://doi.org/10.1109/SEQUEN.1997.666900).
    """
    for values in range(PERMUTATIONS // 2, 1, -1):
        count = PERMUTATIONS // values
        if 1 - (1 - threshold**values) ** count >= RECALL:
            return count, values
    return PERMUTATIONS, 1


def near_groups(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """For each row the index of the first one that it is connected with by rows that are nearly the same.

    Args:
        signatures: uint32 of shape (rows, PERMUTATIONS).
    """
    count, values = bands(threshold)
    first = list(range(len(signatures)))
    # for each band, the rows with the same values in it, by their group
    buckets: list[dict[bytes, dict[int, list[int]]]] = [{} for _ in range(count)]

    def root(row: int) -> int:
        while first[row] != row:
            first[row] = row = first[first[row]]
        return row

    for row, signature in enumerate(signatures):
        for number, bucket in enumerate(buckets):
            band = signature[number * values : (number + 1) * values].tobytes()
            groups = bucket.setdefault(band, {})
            for group, rows in list(groups.items()):
                # most rows of a large group are near all others: one look, and no other at this group
                if root(group) != root(row) and near_one(signatures, rows, signature, threshold):
                    low, high = sorted((root(row), root(group)))
                    first[high] = low
                if root(group) != group:
                    groups.setdefault(root(group), []).extend(groups.pop(group))
            groups.setdefault(root(row), []).append(row)
    return np.array([root(row) for row in range(len(first))], np.int64)


def near_one(signatures: np.ndarray, rows: list[int], signature: np.ndarray, threshold: float) -> bool:
    """Whether a signature is near that of one of these rows; the last ones are looked at first."""
    for end in range(len(rows), 0, -LOOKED_AT):
        some = signatures[rows[max(0, end - LOOKED_AT) : end]]
        if ((some == signature).mean(axis=1) >= threshold).any():
            return True
    return False


def near(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """For each row the first kept row of an estimated Jaccard similarity of `threshold` or more, or itself.

    Args:
        signatures: uint32 of shape (rows, PERMUTATIONS).
    """
    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
    first = np.arange(len(signatures))
    for row, values in enumerate(signatures):
        minhash = MinHash(hashvalues=values, scheme="affine32")
        alike = [kept for kept in index.query(minhash) if np.mean(signatures[kept] == values) >= threshold]
        if alike:
            first[row] = min(alike)
        else:
            index.insert(row, minhash)
    return first
