"""Tokens of a run: counted where rows are there, and taken from published sizes where they are not."""

import pytest

from reprotune import params_file
from reprotune.errors import InputError
from reprotune.model.attention import Segment
from reprotune.planning import workload
from reprotune.planning.tracing import Shape
from tests import steps, tiny
from tests.conftest import changed
from tests.tiny import ROOT


def test_rows_that_are_there_are_counted(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, tiny.alpaca_rows(), tmp_path)
    steps.tokenize_dpo(settings, model, tiny.preference_rows(), tmp_path)
    rows = steps.training_rows(tmp_path)
    lengths = [len(ids) for ids in rows["input_ids"]]
    sft = workload.sft_work(settings, tmp_path / "sft_tokens", 1, by_segment=True)
    expected = sft.steps * settings.sft.global_batch_size * sum(lengths) / len(rows)
    assert sft.tokens == pytest.approx(expected)
    assert 0 <= max(lengths) - sft.largest.length < sft.largest.examples <= workload.TRACED_EXAMPLES
    dpo = workload.dpo_work(settings, tmp_path / "dpo_tokens", 1, shared=True)
    pairs = settings.dpo.steps * settings.dpo.global_batch_size
    assert dpo.steps == settings.dpo.steps
    assert (dpo.largest.rows, dpo.largest.examples) == (1, settings.dpo.micro_batch_size)
    longest = dpo.largest.length / dpo.largest.examples
    assert pairs * longest >= dpo.tokens > pairs * longest / 2


def test_an_unknown_data_set_is_asked_for(settings):
    message = (
        "is not tokenized with these params yet, and its size is not known; "
        "`dvc repro tokenize_sft tokenize_dpo`"
    )
    with pytest.raises(InputError, match=message):
        workload.sft_work(settings, None, 1, by_segment=True)


def test_published_sizes_stand_for_the_recipe():
    recipe = params_file.load(ROOT / "recipes" / "qwen3-4b.yaml")
    work = workload.sft_work(recipe, None, 4, by_segment=True)
    tokens = 16 * 2048
    segments = (Segment(tokens // 8, 0),) * 8
    assert work.steps == 1207 and work.largest == Shape(1, tokens, int(0.65 * tokens), segments, 8)
    few = changed(recipe, {"data.sft.mix": {"alpaca": {"limit": 100, "weight": 1.0}}})
    with pytest.raises(InputError, match="held_out: found 512, expected fewer than the 100 rows"):
        workload.sft_work(few, None, 4, by_segment=True)
