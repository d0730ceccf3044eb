"""Log-probs are lm-eval's own, whatever prefixes requests share."""

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from reprotune.data.chat_tokens import IGNORED, ChatTokens
from reprotune.data.conversations import Conversation
from reprotune.data.templates import load_tokenizer
from reprotune.evaluation.lm_eval_model import Scorer
from reprotune.model import shared_prefixes
from tests import tiny, tokenizers
from tests.evaluation.prompts import ARCHITECTURES, KINDS, generations, instances, policy, requests_of
from tests.tiny import ROOT

COMPUTED = {
    "choices of a row": 0.8,
    "the same examples": 0.2,
    "one letter": 0.5,
    "choices that begin alike": 0.3,
}
"""Share of HFLM's tokens that are computed at most. HFLM pads sequences, and computes prefixes again."""


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(world / "tiny" / "model", ROOT / "templates" / "chatml.jinja")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_those_of_the_harness(architecture, kind, tokenizer, capsys):
    model = policy(architecture, len(tokenizer))
    asked, tokens = instances(requests_of(kind)), []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, arguments: tokens.append(arguments[0].numel())
    )
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    expected = stock.loglikelihood(asked, disable_tqdm=True)
    stock_tokens = sum(tokens)
    scorer = Scorer(model, tokenizer, 512, 4)
    assert scorer.forward.shares()
    tokens.clear()
    answers = scorer.loglikelihood(asked, disable_tqdm=True)
    cut_off = "their first tokens are cut off" in capsys.readouterr().out
    assert cut_off == (kind == "longer than the model")
    assert sum(tokens) < stock_tokens * COMPUTED.get(kind, 1.01)
    for (log_prob, greedy), (expected_log_prob, expected_greedy) in zip(answers, expected, strict=True):
        assert log_prob == pytest.approx(expected_log_prob, abs=1e-4) and greedy == expected_greedy


def test_in_bfloat16_log_probs_are_summed_in_float32(tokenizer):
    """HFLM does so if it is asked to; by default it rounds each log-prob to 8 bits."""
    model = policy("qwen3", len(tokenizer)).to(torch.bfloat16)
    asked = instances(requests_of("choices of a row"))
    expected, rounded = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options).loglikelihood(
            asked, disable_tqdm=True
        )
        for options in ({"softmax_dtype": "float32"}, {})
    )
    answers = Scorer(model, tokenizer, 512, 4).loglikelihood(asked, disable_tqdm=True)
    off = max(
        abs(log_prob - expected_log_prob) / -expected_log_prob
        for (expected_log_prob, _), (log_prob, _) in zip(expected, answers, strict=True)
    )
    assert off < 0.01
    assert all(float(torch.tensor(log_prob).bfloat16()) == log_prob for log_prob, _ in rounded)
    assert any(float(torch.tensor(log_prob).bfloat16()) != log_prob for log_prob, _ in answers)


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_begin_as_training_rows_do(bos, tmp_path):
    """A chat has the tokens of a training row's prompt, and a plain text those that the base gives it."""
    base = tokenizers.bytelevel(
        tmp_path, ("<|im_start|>", "<|im_end|>"), bos, bos_token="<s>", eos_token="</s>"
    )
    tokenizer = load_tokenizer(base, ROOT / "templates" / "chatml.jinja")
    scorer = Scorer(tiny.make_policy("qwen3", None, len(tokenizer)), tokenizer, 512, 4)
    turns = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "cat"}]
    (row,) = ChatTokens(tokenizer).conversations([Conversation(turns)])
    chat = scorer.apply_chat_template(turns[:1])
    prompt = row["input_ids"][: row["labels"].count(IGNORED)]
    assert scorer.tok_encode(chat) == prompt == list(scorer.prompt(chat, 4))
    plain = AutoTokenizer.from_pretrained(base)("the house").input_ids
    assert scorer.tok_encode("the house") == plain == list(scorer.prompt("the house", 4))
    assert plain.count(tokenizer.bos_token_id) == prompt.count(tokenizer.bos_token_id) == bos


@pytest.mark.parametrize("odd", ["positions by length", "a window that is not known", "a cap on the logits"])
def test_a_model_that_cannot_share_is_scored_as_the_harness_does(odd, tokenizer, capsys):
    model = policy("gemma3" if odd == "a window that is not known" else "qwen3", len(tokenizer))
    if odd == "positions by length":
        model.config.rope_parameters["rope_type"] = "dynamic"
    if odd == "a cap on the logits":
        model.set_attn_implementation("eager")
    for layer in model.model.layers:
        if odd == "a window that is not known":
            # it stays in the layer's mask alone
            layer.self_attn.sliding_window = None
        elif odd == "a cap on the logits":
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"softcap": 30.0}), with_kwargs=True
            )
    pairs = requests_of("one letter")
    questions = [question for question, _ in requests_of("the same examples")[:6]]
    prompts = [f"{question} =" for question in questions]
    scorer = Scorer(model, tokenizer, 512, 4)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    answers, expected = (lm.loglikelihood(instances(pairs), disable_tqdm=True) for lm in (scorer, stock))
    for answer, expected_answer in zip(answers, expected, strict=True):
        assert answer == pytest.approx(expected_answer, abs=1e-4)
    written, expected_texts = (
        lm.generate_until(generations(prompts, until=["cat"], max_gen_toks=9), disable_tqdm=True)
        for lm in (scorer, stock)
    )
    assert written == expected_texts
    assert capsys.readouterr().out.count("cannot share prefixes") == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_depend_on_neither_budget_nor_order(architecture, tokenizer, monkeypatch):
    """Nor do they depend on how many attentions compute a batch: one for each sequence, or one for all."""
    model = policy(architecture, len(tokenizer))
    pairs = [pair for kind in KINDS[:5] for pair in requests_of(kind)]
    expected = Scorer(model, tokenizer, 4096, 4).loglikelihood(instances(pairs), disable_tqdm=True)
    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    shuffled, usual = instances([pairs[number] for number in order]), shared_prefixes.LAUNCH_COST
    for max_tokens, launch_cost in ((1, usual), (100, usual), (700, 0), (700, 2**40)):
        monkeypatch.setattr(shared_prefixes, "LAUNCH_COST", launch_cost)
        answers = Scorer(model, tokenizer, max_tokens, 4).loglikelihood(shuffled, disable_tqdm=True)
        for number, (log_prob, greedy) in zip(order, answers, strict=True):
            expected_log_prob, expected_greedy = expected[number]
            assert log_prob == pytest.approx(expected_log_prob, abs=1e-4) and greedy == expected_greedy
