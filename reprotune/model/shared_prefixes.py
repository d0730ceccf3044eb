"""A tree of sequences that share prefixes, computed as one row in which every shared token stands once.

It is a layout for the attention in `reprotune.model.layout_attention`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from reprotune.model.attention import causal

LAUNCH_COST, GPU_LAUNCH_COST = 2**13, 2**19
"""Kernel-launch overhead of one attention, in query-key products. The first was the best of several with
SmolLM2-135M on two cores; the second, for GPUs, is not measured."""


@dataclass
class Block:
    """Consecutive sequences of a row whose own tokens are computed in one attention."""

    queries: slice
    """Places in the row of the tokens that are computed."""
    keys: list[slice]
    """Places of the tokens that they see: prefixes of earlier sequences, then the block itself."""
    positions: torch.Tensor
    """Position of each key in its sequence, (keys,)."""
    seen: torch.Tensor | None
    """Which keys each query sees, (queries, keys): those on its path, itself included. None where plain
    causal attention says the same: one sequence without a shared prefix."""
    windowed: dict[int, torch.Tensor] = field(default_factory=dict)
    """`seen` within a sliding window, by its size."""

    def mask(self, seen: torch.Tensor, window: int | None) -> torch.Tensor:
        """(queries, keys)."""
        if window is None:
            return seen
        if window not in self.windowed:
            query_positions = self.positions[-len(seen) :, None]
            self.windowed[window] = seen & (query_positions - self.positions < window)
        return self.windowed[window]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        """As `PrefixTree.attend`, for the block's own tokens alone."""
        query, key, value = query[:, self.queries], self.select(key), self.select(value)
        if self.seen is None:
            return causal(query[None], key[None], value[None], scaling, window=window)[0].transpose(0, 1)
        # expanding keys and values over a batch of head groups copies neither
        grouped = query.unflatten(0, (len(key), -1))
        key, value = (part[:, None].expand(-1, grouped.shape[1], -1, -1) for part in (key, value))
        mask = self.mask(self.seen, window)
        attended = scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
        return attended.flatten(0, 1).transpose(0, 1)

    def select(self, part: torch.Tensor) -> torch.Tensor:
        """The block's keys, or values, of the whole row's."""
        if len(self.keys) == 1:
            return part[:, self.keys[0]]
        return torch.cat([part[:, places] for places in self.keys], dim=1)


class PrefixTree:
    """A row of tokens, and which of them each sees.

    Args:
        sequences: sorted, without duplicates.
        shared: for each sequence, the length of the prefix that it takes from the one before it.
    """

    def __init__(
        self, sequences: Sequence[Sequence[int]], shared: Sequence[int], device: torch.device
    ) -> None:
        self.paths: list[np.ndarray] = []
        """For each sequence, the places of its tokens in the row."""
        ids: list[int] = []
        for tokens, count in zip(sequences, shared, strict=True):
            places = np.arange(len(ids), len(ids) + len(tokens) - count)
            self.paths.append(np.concatenate([self.paths[-1][:count], places]) if count else places)
            ids += tokens[count:]
        self.ids = torch.tensor([ids], device=device)
        positions = [np.arange(count, len(path)) for path, count in zip(self.paths, shared, strict=True)]
        self.positions = torch.from_numpy(np.concatenate(positions))[None].to(device)
        lengths = [len(path) for path in self.paths]
        launch_cost = LAUNCH_COST if device.type == "cpu" else GPU_LAUNCH_COST
        self.blocks = [self.block(*run, shared) for run in attention_runs(lengths, shared, launch_cost)]

    def block(self, first: int, last: int, shared: Sequence[int]) -> Block:
        """The block of the sequences from `first` to `last`."""
        paths = self.paths[first : last + 1]
        start, stop = int(paths[0][shared[first]]), int(paths[-1][-1]) + 1
        # a shared prefix of a later sequence lies in the first one's prefix or in the block itself
        keys = np.concatenate([paths[0][: shared[first]], np.arange(start, stop)])
        gaps = np.flatnonzero(np.diff(keys) != 1) + 1
        slices = [slice(int(places[0]), int(places[-1]) + 1) for places in np.split(keys, gaps)]
        seen = None
        if first < last or shared[first]:
            on_path = np.zeros((stop - start, len(keys)), bool)
            for path, count in zip(paths, shared[first : last + 1], strict=True):
                positions = np.arange(len(path))
                cells = np.ix_(path[count:] - start, np.searchsorted(keys, path))
                on_path[cells] = positions <= positions[count:, None]
            seen = torch.from_numpy(on_path).to(self.ids.device)
        return Block(slice(start, stop), slices, self.positions[0, keys], seen)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        scaling: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of the row; returns (tokens, heads, width).

        Args:
            query: (heads, tokens, width); key and value have as many heads or a divisor of that.
        """
        return torch.cat([block.attend(query, key, value, scaling, window) for block in self.blocks])


def attention_runs(
    lengths: Sequence[int], shared: Sequence[int], launch_cost: int
) -> Iterator[tuple[int, int]]:
    """First and last of each run of sequences that cost less in one attention than in several.

    One attention for all computes products that no token needs; several cost kernel launches and read a
    shared prefix anew.
    """
    first = queries = keys = cost = 0
    for number, (length, count) in enumerate(zip(lengths, shared, strict=True)):
        new = length - count
        # causal attention computes half of the products
        alone = launch_cost + length * (new if count else new // 2)
        joined = launch_cost + (queries + new) * (keys + new)
        if number and joined <= cost + alone:
            queries, keys, cost = queries + new, keys + new, joined
        else:
            if number:
                yield first, number - 1
            first, queries, keys, cost = number, new, length, alone
    yield first, len(lengths) - 1
