"""What counts as the same text."""

import numpy as np
import pytest

from reprotune.data import duplicates

BASE = (
    "the small red cat sings a song to the big blue dog and the bird that sleeps on the tree "
    "by the green house every day of the year"
)


def test_exact_ignores_case_spacing_and_unicode_form():
    texts = [
        "Café  au\nlait",
        "café au lait",
        "cafe\u0301 AU lait ",
        "cafe au lait",
        "café au lait!",
        "10²",
        "102",
    ]
    digests = np.array([np.void(duplicates.digest(duplicates.normalized([text]))) for text in texts])
    assert duplicates.exact(digests).tolist() == [0, 0, 0, 3, 4, 5, 6]


def test_texts_that_divide_otherwise_differ():
    assert duplicates.normalized(["say", "yes", "no no"]) != duplicates.normalized(["say", "yes no", "no"])


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 0.99])
def test_pairs_just_above_the_threshold_are_found(threshold):
    """The index finds 99% of pairs exactly at the threshold, and one value less is never enough."""
    rng = np.random.default_rng(0)
    agree = int(np.ceil(threshold * duplicates.PERMUTATIONS))
    pairs_found = 0
    for _ in range(200):
        first = rng.integers(2**32, size=duplicates.PERMUTATIONS, dtype=np.uint32)
        second = first.copy()
        changed = rng.permutation(duplicates.PERMUTATIONS)[agree:]
        second[changed] += 1
        just_below = second.copy()
        just_below[rng.permutation(np.setdiff1d(np.arange(duplicates.PERMUTATIONS), changed))[:1]] += 1
        assert duplicates.near(np.array([first, just_below]), threshold).tolist() == [0, 1]
        pairs_found += duplicates.near(np.array([first, second]), threshold)[1] == 0
    assert pairs_found >= 192


def test_near_finds_a_changed_word_and_keeps_the_first():
    words = BASE.split()
    changed = " ".join([*words[:-1], "month"])
    half = " ".join([*words[: len(words) // 2], *reversed(words[len(words) // 2 :])])
    texts = [half, BASE, changed, "one two three four five six", BASE]
    signatures = np.array([duplicates.signature(duplicates.normalized([text])) for text in texts])
    assert duplicates.near(signatures, 0.8).tolist() == [0, 1, 1, 3, 1]


def test_similarity_is_estimated_within_its_error():
    texts = [sorted(f"w{index}" for index in range(start, start + 400)) for start in (0, 100)]
    first, second = (duplicates.signature(" ".join(words)) for words in texts)
    shingles = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in texts]
    true = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    assert abs(np.mean(first == second) - true) < 3 * 0.044


def test_short_and_wordless_texts_have_signatures():
    for text in ("a", "?!", "one two"):
        assert duplicates.signature(text).shape == (duplicates.PERMUTATIONS,)
