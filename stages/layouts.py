"""Where tokens of several sequences lie, and what each of them sees, for transformers' AttentionInterface: a tree of prompts with what they begin with in common, and texts that
are being written, each in a slot of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from stages.attention import causal, check_plain

BY_LAYOUT = "by_layout"
"""Name, among transformers' attentions, of the one below."""
CALL, CALL_ON_GPU = 2**13, 2**19
"""What it costs to start one attention, in products of a query and a key: on two cores the best of several with SmolLM2-135M; for GPUs nobody has measured it."""


@dataclass
class Branches:
    """Sequences, one behind another in the row, whose tokens are computed in one attention."""

    row: slice
    """Places of the tokens that are computed."""
    keys: list[slice]
    """Places of what they see: what the sequences begin with in common with ones before, and their own."""
    positions: torch.Tensor
    """(keys,) where each stands on its sequences."""
    seen: torch.Tensor | None
    """(queries, keys): what lies on the path to a token, itself included; None for one sequence that begins here, each token of which sees those before."""
    masks: dict[int, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """(queries, keys): what is seen, in a sliding window if there is one."""
        if window is None:
            return self.seen
        if window not in self.masks:
            self.masks[window] = self.seen & (self.positions[-len(self.seen) :, None] - self.positions < window)
        return self.masks[window]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
        """(tokens, heads, width) of those that are computed."""
        query = query[:, self.row]
        key, value = (part[:, self.keys[0]] if len(self.keys) == 1 else torch.cat([part[:, keys] for keys in self.keys], dim=1) for part in (key, value))
        if self.seen is None:
            return causal(query[None], key[None], value[None], scaling, window=window)[0].transpose(0, 1)
        # heads that share their keys are those of one row, without copies
        grouped = query.unflatten(0, (len(key), -1))
        shared = (part[:, None].expand(-1, grouped.shape[1], -1, -1) for part in (key, value))
        return scaled_dot_product_attention(grouped, *shared, self.mask(window), scale=scaling).flatten(0, 1).transpose(0, 1)


class Tree:
    """A row of tokens, and which of them each sees.

    Args:
        sequences: sorted, none twice.
        shared: of each, how many tokens it takes from the one before it.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], shared: Sequence[int], device: torch.device) -> None:
        self.paths: list[np.ndarray] = []
        """Of each sequence, the places of its tokens in the row."""
        ids: list[int] = []
        for tokens, count in zip(sequences, shared, strict=True):
            own = np.arange(len(ids), len(ids) + len(tokens) - count)
            self.paths.append(np.concatenate([self.paths[-1][:count], own]) if count else own)
            ids += tokens[count:]
        self.ids = torch.tensor([ids], device=device)
        self.positions = torch.from_numpy(np.concatenate([np.arange(count, len(path)) for path, count in zip(self.paths, shared, strict=True)]))[None].to(device)
        runs = together([len(path) for path in self.paths], shared, CALL if device.type == "cpu" else CALL_ON_GPU)
        self.parts = [self.branches(first, last, shared) for first, last in runs]

    def branches(self, first: int, last: int, shared: Sequence[int]) -> Branches:
        """Of the sequences from the first to the last."""
        paths = self.paths[first : last + 1]
        start, stop = int(paths[0][shared[first]]), int(paths[-1][-1]) + 1
        # what the others begin with lies in what the first takes from before, or among the run's own
        keys = np.concatenate([paths[0][: shared[first]], np.arange(start, stop)])
        ends = np.flatnonzero(np.diff(keys) != 1) + 1
        seen = None
        if first < last or shared[first]:
            seen = np.zeros((stop - start, len(keys)), bool)
            for path, count in zip(paths, shared[first : last + 1], strict=True):
                at = np.arange(len(path))
                seen[np.ix_(path[count:] - start, np.searchsorted(keys, path))] = at <= at[count:, None]
            seen = torch.from_numpy(seen).to(self.ids.device)
        slices = [slice(int(part[0]), int(part[-1]) + 1) for part in np.split(keys, ends)]
        return Branches(slice(start, stop), slices, self.positions[0, keys], seen)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
        """(tokens, heads, width); query is (heads, tokens, width), key and value have as many heads or a divisor of that."""
        return torch.cat([part.attend(query, key, value, scaling, window) for part in self.parts])


def together(lengths: Sequence[int], shared: Sequence[int], call: int) -> Iterator[tuple[int, int]]:
    """The first and the last of runs of sequences that cost less in one attention than in several."""
    first = queries = keys = cost = 0
    for number, (length, count) in enumerate(zip(lengths, shared, strict=True)):
        own = length - count
        # of a sequence that begins here, what comes after a token is not computed
        alone = call + length * (own if count else own // 2)
        joined = call + (queries + own) * (keys + own)
        if number and joined <= cost + alone:
            queries, keys, cost = queries + own, keys + own, joined
        else:
            if number:
                yield first, number - 1
            first, queries, keys, cost = number, own, length, alone
    yield first, len(lengths) - 1


class Slots:
    """Keys and values of texts that are being written: a slot each, of which the first ones are in use. A step computes one token of each.

    Args:
        tokens: of a slot.
    """

    def __init__(self, slots: int, tokens: int) -> None:
        self.slots, self.tokens = slots, tokens
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a layer with keys and values like these, (slots, heads, tokens, width)."""
        if layer not in self.kept:
            self.kept[layer] = tuple(part.new_zeros(self.slots, len(part), self.tokens, part.shape[2]) for part in (key, value))
        return self.kept[layer]

    def move(self, source: int, target: int) -> None:
        for parts in self.kept.values():
            for part in parts:
                part[target] = part[source]

    def begin(self, positions: torch.Tensor) -> None:
        """The next step's tokens, of the first slots, stand at these positions."""
        self.positions, self.length, self.masks = positions, int(positions.max()) + 1, {}

    def mask(self, window: int | None) -> torch.Tensor:
        if window not in self.masks:
            key, at = torch.arange(self.length, device=self.positions.device), self.positions[:, None]
            seen = key <= at
            self.masks[window] = (seen if window is None else seen & (at - key < window))[:, None, None]
        return self.masks[window]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
        """As Tree's; heads that share their keys are computed as queries of one."""
        heads, count, width = query.shape
        every = torch.arange(count, device=query.device)
        seen = []
        for kept, part in zip(self.of(layer, key, value), (key, value), strict=True):
            kept[every, :, self.positions] = part.transpose(0, 1)
            seen.append(kept[:count, :, : self.length])
        grouped = query.transpose(0, 1).reshape(count, len(key), heads // len(key), width)
        return scaled_dot_product_attention(grouped, *seen, self.mask(window), scale=scaling).reshape(count, heads, width)


@dataclass
class Beginnings:
    """A tree whose sequences go into slots, from number `first` on."""

    tree: Tree
    slots: Slots
    first: int

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
        for kept, part in zip(self.slots.of(layer, key, value), (key, value), strict=True):
            for number, path in enumerate(self.tree.paths, start=self.first):
                kept[number, :, : len(path)] = part[:, path]
        return self.tree.attend(layer, query, key, value, scaling, window)


Layout = Tree | Slots | Beginnings


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, scaling: float,
    layout: Layout, sliding_window: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Of one row, (1, heads, tokens, width), whose tokens see what the layout says; (1, tokens, heads, width)."""
    check_plain(module, attention_mask, sliding_window, more)
    return layout.attend(module.layer_idx, query[0], key[0], value[0], scaling, sliding_window)[None], None


AttentionInterface.register(BY_LAYOUT, attention)
