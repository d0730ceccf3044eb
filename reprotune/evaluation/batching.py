"""Batches of token sequences that share prefixes: a prefix is computed once for all sequences behind it."""

from collections.abc import Iterator, Mapping, Sequence

Tokens = tuple[int, ...]
Batch = tuple[list[Tokens], list[int]]
"""Sorted sequences, and the length of the prefix that each shares with the one before it."""

MAX_LOGITS = 2**28
"""Logits that one batch may ask for; in float32 they take 1 GiB."""
MIN_PREFIX = 8
"""Tokens of the shortest prefix that is shared; a shorter one is computed again."""
PREFIX_ROOM = 4
"""Tokens that a batch may hold, in multiples of its longest sequence, while its sequences share a prefix."""


def token_limit(max_tokens: int, longest: int) -> int:
    """Tokens of a batch that goes on from a shared prefix.

    It has room for several continuations of a long prefix, lest the prefix be computed again for every few.

    Args:
        max_tokens: of a batch without a shared prefix.
        longest: tokens of its longest sequence, the prefix included.
    """
    return max(max_tokens, PREFIX_ROOM * longest)


def prediction_limit(vocabulary: int) -> int:
    """Predicted tokens of a batch: each asks for as many logits as the vocabulary has tokens."""
    return MAX_LOGITS // vocabulary


def batches(
    sequences: Sequence[Tokens], predicted: Mapping[Tokens, int], max_tokens: int, max_predicted: int
) -> Iterator[Batch]:
    """Cut sorted sequences, none of them twice, into batches within both limits; one sequence always fits.

    Args:
        predicted: for each sequence, how many of its next-token distributions are asked for.
        max_tokens: computed tokens of a batch, see `token_limit`; a shared prefix counts once.
        max_predicted: predicted tokens of a batch.
    """
    batch: list[Tokens] = []
    prefixes: list[int] = []
    computed = asked = longest = 0
    for tokens in sequences:
        prefix = shared_prefix(batch[-1], tokens) if batch else 0
        prefix = prefix if prefix >= MIN_PREFIX else 0
        limit = token_limit(max_tokens, longest) if prefix else max_tokens
        if batch and (computed + len(tokens) - prefix > limit or asked + predicted[tokens] > max_predicted):
            yield batch, prefixes
            batch, prefixes, prefix = [], [], 0
            computed = asked = longest = 0
        batch.append(tokens)
        prefixes.append(prefix)
        computed += len(tokens) - prefix
        asked += predicted[tokens]
        longest = max(longest, len(tokens))
    if batch:
        yield batch, prefixes


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens of the longest common prefix."""
    for count, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return count
    return min(len(first), len(second))
