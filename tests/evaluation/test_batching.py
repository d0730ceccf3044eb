"""Batches hold as many tokens as they may, and more behind a long prefix."""

from reprotune.evaluation.batching import MIN_PREFIX, PREFIX_ROOM, batches, token_limit


def cut(sequences, max_tokens, max_predicted=10**6):
    return list(batches(sorted(sequences), dict.fromkeys(sequences, 1), max_tokens, max_predicted))


def continuations(prefix, count):
    """Sequences one token longer than a prefix."""
    return [(*range(prefix), number) for number in range(1000, 1000 + count)]


def test_a_long_prefix_leaves_room_for_its_continuations():
    """A batch then holds PREFIX_ROOM times the longest sequence, in computed tokens."""
    sequences = continuations(100, 500)
    assert token_limit(10, 101) == PREFIX_ROOM * 101 == 404 and token_limit(1000, 101) == 1000
    sizes = [len(batch) for batch, _ in cut(sequences, max_tokens=10)]
    # 101 tokens of the first, one of each other
    assert sizes[0] == 1 + 404 - 101 and sum(sizes) == 500
    assert len(cut(sequences, max_tokens=600)) == 1
    # without a prefix there is no such room
    apart = [(number,) * 101 for number in range(5)]
    assert [len(batch) for batch, _ in cut(apart, max_tokens=202)] == [2, 2, 1]


def test_a_short_prefix_is_computed_again():
    for length in (MIN_PREFIX - 1, MIN_PREFIX):
        ((_, prefixes),) = cut(continuations(length, 3), max_tokens=1000)
        assert prefixes == ([0, 0, 0] if length < MIN_PREFIX else [0, length, length])


def test_predictions_are_limited_as_well():
    assert [len(batch) for batch, _ in cut(continuations(100, 10), 1000, max_predicted=4)] == [4, 4, 2]
