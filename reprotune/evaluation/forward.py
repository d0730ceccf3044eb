"""Forward passes on rows of sequences that share prefixes, with logits only where they are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from reprotune.compat.torch import TransposedLinear
from reprotune.compat.transformers import attention_of
from reprotune.model.attention import has_plain_attention
from reprotune.model.layout_attention import BY_LAYOUT, Layout
from reprotune.model.policies import Policy, bare
from reprotune.model.probing import SHARED_PREFIX, row_mismatch
from reprotune.model.shared_prefixes import PrefixTree

FEW_TOKENS = 128
"""Tokens of the longest row that a CPU computes with `TransposedLinear`. With SmolLM2-135M on two cores, a
decoding step of eight sequences then took 0.7 to 0.9 of the time."""


class SharedForward:
    """Forward passes over layouts: prefix trees, and decoding steps on KV-cache slots.

    Args:
        policy: in eval mode.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.device: torch.device = policy.device
        self.can_share: bool | None = None
        """What `shares` found; None before it was asked."""

    def logits(
        self, layout: Layout, ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Logits in float32, (wanted, vocabulary), at these places of a row; only inside `sharing`.

        Args:
            ids, positions: (1, tokens).
            wanted: places in the row, (wanted,).
        """
        few = ids.device.type == "cpu" and ids.shape[1] <= FEW_TOKENS
        with torch.no_grad(), TransposedLinear() if few else nullcontext():
            outputs = self.policy(
                input_ids=ids,
                position_ids=positions,
                layout=layout,
                logits_to_keep=wanted.to(ids.device),
                use_cache=False,
            )
        return outputs.logits[0].float()

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Have the model attend by layout inside a `with` block."""
        model = bare(self.policy)
        usual = attention_of(model.config)
        model.set_attn_implementation(BY_LAYOUT)
        try:
            yield
        finally:
            model.set_attn_implementation(usual)

    def shares(self) -> bool:
        """Whether sequences keep their logits when they share a prefix; tried once, on two short ones."""
        if self.can_share is None:
            model = bare(self.policy)
            if has_plain_attention(model.config.get_text_config()):
                mismatch = row_mismatch(self.policy, self.logits_in_one_tree)
            else:
                mismatch = "not every layer attends causally, at positions that the row's length leaves alone"
            self.can_share = mismatch is None
            if mismatch is not None:
                print(
                    f"{type(model).__name__} cannot share prefixes ({mismatch}); "
                    "lm-eval's own code scores it, which takes longer",
                    flush=True,
                )
        return self.can_share

    def logits_in_one_tree(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """The logits of both sequences of `row_mismatch`, computed as one tree."""
        tree = PrefixTree([first.tolist(), second.tolist()], [0, SHARED_PREFIX], self.device)
        with self.sharing():
            logits = self.logits(tree, tree.ids, tree.positions, torch.arange(tree.ids.shape[1]))
        return logits[np.concatenate(tree.paths)]
