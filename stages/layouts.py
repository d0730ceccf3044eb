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
PADDING = 1.5
"""How many times their own products of queries and keys a group of branches may take, padded to the longest."""


@dataclass
class Group:
    """Branches of like size, padded to the longest."""

    queries: torch.Tensor
    """(branches, queries): places in the row, 0 where there is none."""
    keys: torch.Tensor
    """(branches, keys): places in the row, of the whole path."""
    own: torch.Tensor
    """(branches, 1, 1, 1): where on its path a branch's own tokens begin."""
    length: torch.Tensor
    """(branches, 1, 1, 1): tokens of the path."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """(branches, 1, queries, keys): what comes before, in a sliding window if there is one."""
        if window not in self.masks:
            device = self.queries.device
            at = self.own + torch.arange(self.queries.shape[1], device=device)[:, None]
            key = torch.arange(self.keys.shape[1], device=device)
            seen = (key <= at) & (key < self.length)
            self.masks[window] = seen if window is None else seen & (at - key < window)
        return self.masks[window]


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
        positions = np.concatenate([np.arange(count, len(path)) for path, count in zip(self.paths, shared, strict=True)])
        self.ids = torch.tensor([ids], device=device)
        self.positions = torch.from_numpy(positions)[None].to(device)
        self.trunks = [slice(int(path[0]), int(path[-1]) + 1) for path, count in zip(self.paths, shared, strict=True) if not count]
        branches = sorted((len(path), len(path) - count, number) for number, (path, count) in enumerate(zip(self.paths, shared, strict=True)) if count)
        self.groups = []
        places = [np.arange(trunk.start, trunk.stop) for trunk in self.trunks]
        for members in alike(branches):
            keys, queries = max(size[0] for size in members), max(size[1] for size in members)
            paths = [self.paths[number] for *_, number in members]
            starts = [shared[number] for *_, number in members]
            own = [path[start:] for path, start in zip(paths, starts, strict=True)]
            places += [padded(one, queries, -1) for one in own]
            self.groups.append(
                Group(
                    torch.from_numpy(np.stack([padded(one, queries, 0) for one in own])).to(device),
                    torch.from_numpy(np.stack([padded(path, keys, 0) for path in paths])).to(device),
                    torch.tensor(starts, device=device)[:, None, None, None],
                    torch.tensor([len(path) for path in paths], device=device)[:, None, None, None],
                )
            )
        computed = np.concatenate(places)
        order = np.empty(len(ids), np.int64)
        order[computed[computed >= 0]] = np.flatnonzero(computed >= 0)
        self.order = torch.from_numpy(order).to(device)
        """Where each token of the row stands among what the trunks and groups give."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
        """(tokens, heads, width); query is (heads, tokens, width), key and value have as many heads or a divisor of that."""
        heads, times, found = len(query), len(query) // len(key), []
        for trunk in self.trunks:
            own = (part[None, :, trunk] for part in (query, key, value))
            found.append(causal(*own, scaling, window=window)[0].transpose(0, 1))
        for group in self.groups:
            own = (query[:, group.queries], *(part[:, group.keys].repeat_interleave(times, 0) for part in (key, value)))
            given = scaled_dot_product_attention(*(part.transpose(0, 1) for part in own), group.mask(window), scale=scaling)
            found.append(given.transpose(1, 2).reshape(-1, heads, query.shape[2]))
        return torch.cat(found)[self.order]


def padded(values: np.ndarray, length: int, filler: int) -> np.ndarray:
    return np.pad(values, (0, length - len(values)), constant_values=filler)


def alike(sizes: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Runs of these (keys, queries, number) whose padding stays within bounds."""
    members: list[tuple[int, int, int]] = []
    for size in sizes:
        more = [*members, size]
        area = len(more) * max(one[0] for one in more) * max(one[1] for one in more)
        if members and area > PADDING * sum(keys * queries for keys, queries, _ in more):
            yield members
            more = [size]
        members = more
    if members:
        yield members


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
