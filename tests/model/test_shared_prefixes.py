"""A prefix tree gives each sequence the attention that it has alone, in however many attentions."""

import numpy as np
import pytest
import torch

from reprotune.model import shared_prefixes
from reprotune.model.layout_attention import attention_by_layout
from reprotune.model.shared_prefixes import PrefixTree
from tests.model import naive

SEQUENCES = [(1, 2, 3, 4, 5), (1, 2, 3, 6), (1, 2, 3, 6, 7, 8), (1, 9), (2, 3), (2, 4, 5)]
SHARED = [0, 3, 4, 1, 0, 1]
CPU = torch.device("cpu")


def test_each_shared_token_stands_once():
    tree = PrefixTree(SEQUENCES, SHARED, CPU)
    assert tree.ids.shape[1] == sum(map(len, SEQUENCES)) - sum(SHARED)
    for tokens, path in zip(SEQUENCES, tree.paths, strict=True):
        assert tuple(tree.ids[0, path].tolist()) == tokens
        assert tree.positions[0, path].tolist() == list(range(len(tokens)))


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize(("launch_cost", "attentions"), [(0, 6), (8, None), (2**40, 1)])
def test_a_sequence_attends_as_if_it_were_alone(launch_cost, attentions, window, monkeypatch):
    monkeypatch.setattr(shared_prefixes, "LAUNCH_COST", launch_cost)
    tree = PrefixTree(SEQUENCES, SHARED, CPU)
    assert attentions is None or len(tree.blocks) == attentions
    query, key, value = naive.projections(tree.ids.shape[1])
    attended, _ = attention_by_layout(
        naive.PLAIN, query[None], key[None], value[None], None, naive.SCALING, tree, sliding_window=window
    )
    for path in tree.paths:
        alone = naive.attend(query[:, path], key[:, path], value[:, path], window)
        torch.testing.assert_close(attended[0, path], alone)


def test_places_of_a_path_rise():
    for path in PrefixTree(SEQUENCES, SHARED, CPU).paths:
        assert (np.diff(path) > 0).all()


@pytest.mark.parametrize(
    ("lengths", "shared", "runs"),
    [
        ([1000, 1004, 1003], [0, 999, 999], [(0, 0), (1, 2)]),
        ([600, 700, 700], [0, 500, 500], [(0, 0), (1, 1), (2, 2)]),
        ([30, 40, 30, 40], [0, 29, 0, 29], [(0, 3)]),
        ([500], [0], [(0, 0)]),
    ],
    ids=["choices", "rows", "short rows", "one"],
)
def test_one_attention_computes_what_costs_less_together(lengths, shared, runs):
    assert list(shared_prefixes.attention_runs(lengths, shared, 2**13)) == runs
