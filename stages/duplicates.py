"""Rows whose text came before: the same one after normalization, or nearly the same by MinHash.

Where rows are alike, the first in source order stays, sources in the order of their names: the same on every run.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 128
"""Hash functions of a signature; its estimate of a Jaccard similarity has a standard error of at most 1 / (2 √128) = 0.044."""
SHINGLE = 5
"""Words that are compared as one."""


def normalized(texts: Sequence[str]) -> str:
    """The texts without what makes no difference: letter case, spacing, and how Unicode composes a letter; NUL between them."""
    return "\0".join(" ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in texts)


def digest(text: str) -> bytes:
    """16 bytes that stand for a normalized text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def signature(text: str) -> np.ndarray:
    """MinHash values of the shingles of a normalized text, uint32 of shape (PERMUTATIONS,)."""
    words = re.findall(r"\w+", text) or [text]
    shingles = {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}
    minhash = MinHash(PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
    minhash.update_batch(shingle.encode() for shingle in sorted(shingles))
    return minhash.hashvalues


def exact(digests: np.ndarray) -> np.ndarray:
    """For each row the first row with its digest: itself, unless it is a duplicate."""
    high, low = digests.view(np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    first = np.empty_like(order)
    # lexsort is stable: the first of equal rows in `order` is the first of all
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


def bands(threshold: float) -> tuple[int, int]:
    """(bands, values in each) that make 99% of the pairs at the threshold candidates, and of fewer others the more values they have.

    A pair of similarity s shares a band with probability 1 - (1 - s^values)^bands (https://doi.org/10.1109/SEQUEN.1997.666900).
    """
    for values in range(PERMUTATIONS // 2, 1, -1):
        count = PERMUTATIONS // values
        if 1 - (1 - threshold**values) ** count >= 0.99:
            return count, values
    return PERMUTATIONS, 1


def near(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """For each row the first kept row whose estimated Jaccard similarity is at least `threshold`: itself, if there is none.

    Args:
        signatures: shape (rows, PERMUTATIONS).
    """
    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
    found = np.arange(len(signatures))
    for row, values in enumerate(signatures):
        minhash = MinHash(hashvalues=values, scheme="affine32")
        alike = [other for other in index.query(minhash) if np.mean(signatures[other] == values) >= threshold]
        if alike:
            found[row] = min(alike)
        else:
            index.insert(row, minhash)
    return found
