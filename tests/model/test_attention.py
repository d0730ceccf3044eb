"""Attention by segment is the attention of each sequence alone, and what it cannot compute is refused."""

from argparse import Namespace

import pytest
import torch

from reprotune.compat.transformers import attention_of
from reprotune.model.attention import (
    BY_SEGMENT,
    Segment,
    attend_by_segment,
    attention_by_segment,
    can_attend_by_segment,
    segments,
)
from tests.model import naive
from tests.tiny import make_policy

POSITIONS = torch.tensor([[*range(7), 3, 4, 5, 2, *range(4), *range(2), 1]])
"""Two continuations of a sequence of 7; one sequence of 4; one of 2, with a continuation."""
PATHS = [
    list(range(7)),
    [0, 1, 2, 7, 8, 9],
    [0, 1, 10],
    [11, 12, 13, 14],
    [15, 16],
    [15, 17],
]
"""Places in the row of the tokens of each."""


def test_segments_are_told_apart_by_their_positions():
    assert segments(POSITIONS.clone()) == [
        Segment(7, 0), Segment(3, 3), Segment(1, 2), Segment(4, 0), Segment(2, 0), Segment(1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("window", [None, 2, 5])
def test_each_segment_attends_as_if_it_were_alone(window):
    query, key, value = naive.projections(POSITIONS.shape[1])
    attended, _ = attention_by_segment(
        naive.PLAIN, query[None], key[None], value[None], None, naive.SCALING, POSITIONS.clone(),
        sliding_window=window,
    )  # fmt: skip
    for path in PATHS:
        alone = naive.attend(query[:, path], key[:, path], value[:, path], window)
        torch.testing.assert_close(attended[0, path], alone)


@pytest.mark.parametrize(
    ("extra", "layer", "message"),
    [
        ({"softcap": 30.0}, naive.PLAIN, "was given softcap"),
        ({"attention_mask": torch.ones(1)}, naive.PLAIN, "was given attention_mask"),
        (
            {},
            Namespace(config=Namespace(layer_types=["full_attention", "sliding_attention"]), layer_idx=1),
            "the window of a layer is not known",
        ),
    ],
)
def test_what_it_does_not_compute_is_refused(extra, layer, message):
    query, key, value = (part[None] for part in naive.projections(4))
    arguments = {"attention_mask": None, "scaling": 1.0, "position_ids": torch.arange(4)[None]} | extra
    with pytest.raises(NotImplementedError, match=message):
        attention_by_segment(layer, query, key, value, **arguments)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma3"])
def test_a_model_is_switched_and_stays_so(architecture):
    model = make_policy(architecture, "sdpa").eval()
    assert attend_by_segment(model) and attention_of(model.config) == BY_SEGMENT
    assert attend_by_segment(model)


def test_a_model_that_computes_otherwise_is_left_alone(capsys):
    """Its first layer has a window that only its mask knows."""
    model = make_policy("gemma3", "sdpa").eval()
    model.model.layers[0].self_attn.sliding_window = None
    assert not attend_by_segment(model) and attention_of(model.config) == "sdpa"
    message = (
        "Gemma3ForCausalLM cannot attend by segment (NotImplementedError: the window of a layer is not known)"
    )
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("change", ["eager", "dynamic", "chunked_attention"])
def test_which_models_can_attend_by_segment(change):
    config = make_policy("qwen3", "eager" if change == "eager" else "sdpa").config
    if change == "dynamic":
        config.rope_parameters["rope_type"] = change
    if change == "chunked_attention":
        config.layer_types = [change, "full_attention"]
    assert not can_attend_by_segment(config)
