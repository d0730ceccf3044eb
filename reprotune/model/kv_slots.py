"""A KV cache for generation.

Each sequence being generated owns a slot; a finished sequence frees its slot for the next prompt.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from reprotune.model.shared_prefixes import PrefixTree


class Slots:
    """The KV cache, as the layout of a decoding step: one token of each sequence in the first slots.

    Args:
        slots: sequences at most.
        tokens: of a slot, at most.
    """

    positions: torch.Tensor
    """Position of the step's token in each slot, (slots in use,)."""
    length: int
    """Tokens that the longest sequence has after the step."""

    def __init__(self, slots: int, tokens: int) -> None:
        self.slots, self.tokens = slots, tokens
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.masks: dict[int | None, torch.Tensor] = {}

    def cache(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's cached keys and values, (slots, heads, tokens, width).

        The first call allocates them in the shape of the new ones, (heads, slots in use, width).
        """
        if layer not in self.layers:
            keys, values = (
                new.new_zeros(self.slots, len(new), self.tokens, new.shape[2]) for new in (key, value)
            )
            self.layers[layer] = keys, values
        return self.layers[layer]

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for cached in self.layers.values():
            for part in cached:
                part[target] = part[source]

    def begin(self, positions: torch.Tensor) -> None:
        """Begin a decoding step, whose tokens stand at these positions of the first slots."""
        self.positions, self.length, self.masks = positions, int(positions.max()) + 1, {}

    def mask(self, window: int | None) -> torch.Tensor:
        """Which cached tokens each slot's new token sees, (slots in use, 1, 1, length)."""
        if window not in self.masks:
            cached, new = torch.arange(self.length, device=self.positions.device), self.positions[:, None]
            seen = cached <= new
            seen = seen if window is None else seen & (new - cached < window)
            self.masks[window] = seen[:, None, None]
        return self.masks[window]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        scaling: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """Cache the step's keys and values, and attend; as `PrefixTree.attend`, with a token per slot."""
        heads, count, width = query.shape
        in_use = torch.arange(count, device=query.device)
        seen = []
        for cached, new in zip(self.cache(layer, key, value), (key, value), strict=True):
            cached[in_use, :, self.positions] = new.transpose(0, 1)
            seen.append(cached[:count, :, : self.length])
        # heads that share a key are computed as queries of one head
        grouped = query.transpose(0, 1).reshape(count, len(key), heads // len(key), width)
        keys, values = seen
        attended = scaled_dot_product_attention(grouped, keys, values, self.mask(window), scale=scaling)
        return attended.reshape(count, heads, width)


@dataclass
class Prefill:
    """A tree of prompts whose keys and values go into slots, from number `first` on."""

    tree: PrefixTree
    slots: Slots
    first: int

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        scaling: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """As `PrefixTree.attend`."""
        for cached, new in zip(self.slots.cache(layer, key, value), (key, value), strict=True):
            for slot, path in enumerate(self.tree.paths, start=self.first):
                cached[slot, :, : len(path)] = new[:, path]
        return self.tree.attend(layer, query, key, value, scaling, window)
