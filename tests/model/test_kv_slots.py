"""Decoding steps on slots see what the same sequences would see as a whole."""

import pytest
import torch

from reprotune.model.kv_slots import Prefill, Slots
from reprotune.model.layout_attention import attention_by_layout
from reprotune.model.shared_prefixes import PrefixTree
from tests.model import naive

PROMPTS, SHARED = [(1, 2, 3), (1, 2, 4, 5), (6,)], [0, 2, 0]
NEW = 3
CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [None, 2])
def test_steps_after_a_prefill_attend_as_the_whole_does(window):
    """After the first step, sequence 0 is finished and sequence 2 takes its slot."""
    tree = PrefixTree(PROMPTS, SHARED, CPU)
    lengths = [len(prompt) for prompt in PROMPTS]
    wholes = [naive.projections(100 + length) for length in lengths]
    row = [torch.empty(heads, tree.ids.shape[1], naive.WIDTH) for heads in (naive.HEADS, 2, 2)]
    for path, shared, whole in zip(tree.paths, SHARED, wholes, strict=True):
        # a shared prefix has the same keys and values in all sequences
        for in_row, part in zip(row, whole, strict=True):
            part[:, :shared] = in_row[:, path[:shared]]
            in_row[:, path] = part[:, : len(path)]
    slots = Slots(len(PROMPTS) + 1, max(lengths) + NEW)

    def attend(parts, layout):
        query, key, value = (part[None] for part in parts)
        attended, _ = attention_by_layout(
            naive.PLAIN, query, key, value, None, naive.SCALING, layout, sliding_window=window
        )
        return attended[0]

    prefilled = attend(row, Prefill(tree, slots, 0))
    expected = [
        naive.attend(*(part[:, : length + NEW] for part in whole), window)
        for length, whole in zip(lengths, wholes, strict=True)
    ]
    for path, alone in zip(tree.paths, expected, strict=True):
        torch.testing.assert_close(prefilled[path], alone[: len(path)])
    order = [0, 1, 2]
    for step in range(NEW):
        positions = [lengths[number] + step for number in order]
        tokens = [
            torch.stack([wholes[number][part][:, at] for number, at in zip(order, positions, strict=True)], 1)
            for part in range(3)
        ]
        slots.begin(torch.tensor(positions))
        attended = attend(tokens, slots)
        for slot, (number, at) in enumerate(zip(order, positions, strict=True)):
            torch.testing.assert_close(attended[slot], expected[number][at])
        if step == 0:
            slots.move(2, 0)
            order = [2, 1]


def test_a_later_prefill_goes_behind_the_slots_in_use():
    slots = Slots(3, 6)
    for first, prompts in ((0, [(1, 2)]), (1, [(3, 4, 5)])):
        tree = PrefixTree(prompts, [0], CPU)
        query, key, value = naive.projections(tree.ids.shape[1])
        Prefill(tree, slots, first).attend(0, query, key, value, naive.SCALING, None)
        keys, values = slots.layers[0]
        torch.testing.assert_close(keys[first, :, : len(prompts[0])], key)
        torch.testing.assert_close(values[first, :, : len(prompts[0])], value)
    assert not keys[2].any()
