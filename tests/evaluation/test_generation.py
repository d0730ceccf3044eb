"""Generations are lm-eval's own, whatever is generated together."""

import random

import pytest
from lm_eval.models.huggingface import HFLM

from reprotune.data.templates import load_tokenizer
from reprotune.evaluation.lm_eval_model import Scorer
from tests.evaluation.prompts import ARCHITECTURES, generations, policy, text
from tests.tiny import ROOT


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(world / "tiny" / "model", ROOT / "templates" / "chatml.jinja")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_are_those_of_the_harness(architecture, tokenizer):
    model = policy(architecture, len(tokenizer))
    rng = random.Random(3)
    shots = text(rng, 40)
    prompts = [f"{shots} {text(rng, 2 + number % 9)}" for number in range(13)]
    prompts += [text(rng, 1200), "red", "red"]
    asked = generations(prompts, until=["cat", "dog bird"], do_sample=False, max_gen_toks=40)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    expected = stock.generate_until(asked, disable_tqdm=True)
    for slots in (1, 3, 16):
        scorer = Scorer(model, tokenizer, 512, slots)
        # HFLM's own generation would fail
        scorer._model_generate = None
        assert scorer.generate_until(asked, disable_tqdm=True) == expected
    assert len(set(expected)) > 5


def test_what_a_generation_config_says_of_the_length_does_not_count(tokenizer):
    """That of Qwen's base models says 2,048 tokens, which transformers would prefer to the task's number."""
    model = policy("qwen3", len(tokenizer))
    asked = generations(["red"], until=["nothing"], max_gen_toks=5)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    expected = stock.generate_until(asked, disable_tqdm=True)
    model.generation_config.max_new_tokens = 50
    scorer = Scorer(model, tokenizer, 512, 4)
    assert scorer.generate_until(asked, disable_tqdm=True) == expected
    scorer.forward.can_share = False
    assert scorer.generate_until(asked, disable_tqdm=True) == expected
