"""Greedy generation: each sequence owns a KV-cache slot, and a finished one frees it for the next prompt."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from reprotune.evaluation.batching import Tokens, batches, prediction_limit
from reprotune.evaluation.forward import SharedForward
from reprotune.model.kv_slots import Prefill, Slots
from reprotune.model.layout_attention import Layout
from reprotune.model.shared_prefixes import PrefixTree

Generation = tuple[Tokens, list[int]]
"""A prompt, and the tokens generated so far."""

GREEDY_ARGUMENTS = {"until", "max_gen_toks", "do_sample", "temperature"}
"""Arguments of a request that greedy decoding follows, as long as `do_sample` is false."""
SAMPLING = {"do_sample", "temperature", "top_p", "top_k"}
"""Settings of a generation config that change no token of greedy decoding."""
IGNORED_SETTINGS = {
    "eos_token_id", "pad_token_id", "bos_token_id", "max_length", "max_new_tokens", "transformers_version",
    "_from_model_config", "use_cache", "cache_implementation", "output_attentions", "output_hidden_states",
}  # fmt: skip
"""Settings that change no token of any decoding, or that a request or the generator sets itself."""
ROUNDS = 8
"""Prompts of one batch, in multiples of the slots. Checkpoints hold whole batches."""
REFILL = 4
"""Free slots are filled once 1/REFILL of all are free, so that several prompts are prefilled together."""


class StopRule(NamedTuple):
    """When a generation ends, apart from the model's end-of-sequence tokens."""

    new_tokens: int
    strings: tuple[str, ...]


def unsupported(requests: Iterable[Mapping[str, Any]], config: GenerationConfig) -> set[str]:
    """What requests or the model's generation config ask for beyond greedy decoding, such as sampling.

    Args:
        requests: the arguments of each, normalized by lm-eval.
    """
    names: set[str] = set()
    for arguments in requests:
        names |= arguments.keys() - GREEDY_ARGUMENTS
        names |= {"do_sample"} if arguments.get("do_sample") else set()
    return names | config.to_diff_dict().keys() - IGNORED_SETTINGS - SAMPLING


def plan(prompts: Mapping[StopRule, Iterable[Tokens]], slots: int) -> list[tuple[StopRule, list[Tokens]]]:
    """Batches of sorted prompts with the same stop rule."""
    size = slots * ROUNDS
    return [
        (rule, batch[start : start + size])
        for rule, batch in sorted((rule, sorted(group)) for rule, group in prompts.items())
        for start in range(0, len(batch), size)
    ]


@dataclass
class Generator:
    forward: SharedForward
    tokenizer: PreTrainedTokenizerBase
    eos_ids: set[int]
    max_tokens: int
    """Tokens that are prefilled together."""
    slots: int
    """Sequences that are generated together."""

    def generate(self, prompts: Sequence[Tokens], rule: StopRule) -> Iterator[Generation]:
        """Generate from sorted prompts; yields each generation when it has ended."""
        # a token decodes to a byte at least, so no stop string reaches further back
        tail = max(len(string.encode()) for string in rule.strings) + 2
        slots = Slots(min(self.slots, len(prompts)), max(map(len, prompts)) + rule.new_tokens)
        waiting = deque(prompts)
        active: list[Generation] = []
        while waiting or active:
            free = slots.slots - len(active)
            if waiting and free >= min(len(waiting), -(-slots.slots // REFILL)):
                first_tokens = self.prefill(list(islice(waiting, free)), slots, len(active))
                active += [(waiting.popleft(), [token]) for token in first_tokens]
            else:
                for (_, tokens), token in zip(active, self.decode(active, slots), strict=True):
                    tokens.append(token)
            texts = self.tokenizer.batch_decode([tokens[-tail:] for _, tokens in active])
            for slot in reversed(range(len(active))):
                if self.has_ended(active[slot][1], texts[slot], rule):
                    yield active[slot]
                    # slots in use stay the first ones: the last one's sequence moves into the gap
                    last = active.pop()
                    if slot < len(active):
                        active[slot] = last
                        slots.move(len(active), slot)

    def prefill(self, prompts: list[Tokens], slots: Slots, first: int) -> list[int]:
        """Read as many of the sorted prompts as one batch takes into slots, from number `first` on.

        Returns:
            The first new token of each of these.
        """
        max_prompts = prediction_limit(len(self.tokenizer))
        sequences, prefixes = next(batches(prompts, dict.fromkeys(prompts, 1), self.max_tokens, max_prompts))
        tree = PrefixTree(sequences, prefixes, self.forward.device)
        last = torch.from_numpy(np.array([path[-1] for path in tree.paths]))
        return self.likeliest(Prefill(tree, slots, first), tree.ids, tree.positions, last)

    def decode(self, active: list[Generation], slots: Slots) -> list[int]:
        """The next token of each active sequence; number i owns slot i."""
        device = self.forward.device
        ids = torch.tensor([[tokens[-1] for _, tokens in active]], device=device)
        positions = torch.tensor([len(prompt) + len(tokens) - 1 for prompt, tokens in active], device=device)
        slots.begin(positions)
        return self.likeliest(slots, ids, positions[None], torch.arange(len(active)))

    def likeliest(
        self, layout: Layout, ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor
    ) -> list[int]:
        """The likeliest next token at each wanted place; arguments as for `SharedForward.logits`."""
        return self.forward.logits(layout, ids, positions, wanted).argmax(dim=1).tolist()

    def has_ended(self, tokens: list[int], text: str, rule: StopRule) -> bool:
        return (
            tokens[-1] in self.eos_ids
            or len(tokens) == rule.new_tokens
            or any(string in text for string in rule.strings)
        )
