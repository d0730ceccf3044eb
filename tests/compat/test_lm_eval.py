"""lm-eval: the private hook of its Hugging Face model, and settings that it leaves to its caller."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import langdetect
import pytest
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from reprotune.compat.lm_eval import (
    TokenScorer,
    let_tasks_limit_length,
    seed_language_detection,
    without_environment,
)
from tests.tiny import make_policy

PAIRS = [("the red cat", " runs"), ("the dog", " sleeps and"), ("", "a bird")]


@pytest.fixture
def policy(tokenizer):
    return make_policy("qwen3", "sdpa", len(tokenizer)).eval()


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def generation(tokens: int, *prompts: str) -> list[Instance]:
    settings = {"until": ["nothing"], "do_sample": False, "max_gen_toks": tokens}
    return instances("generate_until", [(prompt, settings) for prompt in prompts])


def test_requests_reach_the_hook_as_tokens(policy, tokenizer):
    seen = []

    class Recording(TokenScorer):
        def score_tokens(self, requests, disable_tqdm):
            seen.extend(requests)
            return super().score_tokens(requests, disable_tqdm)

    asked = instances("loglikelihood", PAIRS)
    answers, expected = (
        scorer(pretrained=policy, tokenizer=tokenizer, batch_size=2).loglikelihood(asked, disable_tqdm=True)
        for scorer in (Recording, HFLM)
    )
    assert answers == expected
    assert [texts for texts, _, _ in seen] == PAIRS
    assert tokenizer.decode(seen[0][1]) == "the red cat" and tokenizer.decode(seen[0][2]) == " runs"


def test_sequences_are_generated_one_by_one(policy, tokenizer):
    rows = []
    policy.get_input_embeddings().register_forward_pre_hook(
        lambda module, arguments: rows.append(len(arguments[0]))
    )
    asked = generation(5, "the red cat", "the dog", "a bird")
    scorer = TokenScorer(pretrained=policy, tokenizer=tokenizer, batch_size=3)
    scorer.generate_until(asked, disable_tqdm=True)
    assert max(rows) == 3
    rows.clear()
    texts = scorer.generate_one_by_one(asked, disable_tqdm=True)
    assert set(rows) == {1}
    stock = HFLM(pretrained=policy, tokenizer=tokenizer, batch_size=1)
    assert texts == stock.generate_until(asked, disable_tqdm=True)


def test_a_models_own_length_overrides_a_tasks_unless_dropped(policy, tokenizer):
    steps = []
    policy.get_input_embeddings().register_forward_pre_hook(lambda *_: steps.append(0))
    policy.generation_config.max_new_tokens, policy.generation_config.eos_token_id = 9, None
    scorer = TokenScorer(pretrained=policy, tokenizer=tokenizer, batch_size=1)
    scorer.generate_until(generation(5, "the red cat"), disable_tqdm=True)
    assert len(steps) == 9
    steps.clear()
    let_tasks_limit_length(policy)
    scorer.generate_until(generation(5, "the red cat"), disable_tqdm=True)
    assert len(steps) == 5


def test_a_detected_language_is_a_draw_unless_seeded(monkeypatch):
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", None)

    def detected() -> set[str]:
        return {str(langdetect.detect_langs("Hello world")) for _ in range(20)}

    assert len(detected()) > 1
    seed_language_detection(1)
    assert len(detected()) == 1


def test_packages_and_devices_are_listed_unless_left_out():
    assert "add_env_info(results)" in inspect.getsource(evaluator.simple_evaluate)
    listed, left_out = {}, {}
    evaluator.add_env_info(listed)
    with without_environment():
        evaluator.add_env_info(left_out)
    assert "pretty_env_info" in listed and left_out == {}


def test_ifeval_detects_languages():
    (folder,) = find_spec("lm_eval.tasks.ifeval").submodule_search_locations
    assert "langdetect.detect(" in Path(folder, "instructions.py").read_text()
