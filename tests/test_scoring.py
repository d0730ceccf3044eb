"""Scores and texts are lm-eval's own, whatever requests share."""

import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from stages import layouts, scoring
from stages.templating import load_tokenizer
from tests.tiny import ROOT, WORDS, make_policy

ARCHITECTURES = ("qwen3", "llama", "gemma3")


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(world / "tiny" / "model", ROOT / "templates" / "chatml.jinja")


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def requests_of(kind: str) -> list[tuple[str, str]]:
    """Contexts and continuations."""
    rng = random.Random(kind)
    shots = "".join(f"{text(rng, 9)} = {text(rng, 2)}\n\n" for _ in range(12))
    if kind == "choices of a row":
        return [(context, f" {text(rng, length)}") for context in (text(rng, 12) for _ in range(9)) for length in (1, 3, 8, 5)]
    if kind == "the same examples":
        return [(f"{shots}{question} =", f" {text(rng, 2)}") for question in (text(rng, 6) for _ in range(8)) for _ in range(3)]
    if kind == "one letter":
        return [(f"{shots}{question}\nAnswer:", f" {letter}") for question in (text(rng, 6) for _ in range(8)) for letter in "ABCD"]
    if kind == "choices that begin alike":
        return [(f"{shots}say", f" {start} {end}") for start in ("the cat", "the big cat", "") for end in ("runs", "runs home", "runs home now", "sleeps")]
    if kind == "contexts with an end in common":
        return [(f"{text(rng, 3)} {shots}", "red") for _ in range(5)]
    if kind == "duplicates and nothing before":
        return [("", text(rng, 5))] * 3 + [("", "a")] + [("red", " cat")] * 2 + [("red ", "cat"), ("red  ", " "), ("red", " ")]
    assert kind == "longer than the model"
    return [(f"{text(rng, 1200)} {ending}", f" {text(rng, 3)}") for ending in ("one", "two") for _ in range(2)] + [("red", " cat")]


KINDS = ("choices of a row", "the same examples", "one letter", "choices that begin alike", "contexts with an end in common", "duplicates and nothing before", "longer than the model")


def instances(pairs: list[tuple], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_those_of_the_harness(architecture, kind, tokenizer, capsys):
    model = policy(architecture, len(tokenizer))
    asked = instances(requests_of(kind))
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(asked, disable_tqdm=True)
    stock = sum(seen)
    scorer = scoring.Scorer(model, tokenizer, 512, 4)
    assert scorer.shares()
    seen.clear()
    found = scorer.loglikelihood(asked, disable_tqdm=True)
    assert ("they lose their beginning" in capsys.readouterr().out) == (kind == "longer than the model")
    # texts of many lengths are padded there, and their beginnings computed again
    assert sum(seen) < stock * {"choices of a row": 0.8, "the same examples": 0.2, "one letter": 0.5, "choices that begin alike": 0.3}.get(kind, 1.01)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4) and one[1] == other[1]


def test_in_bfloat16_log_probs_are_summed_in_float32(tokenizer):
    """As HFLM's are if it is asked to; by itself it rounds each to 8 bits."""
    model = policy("qwen3", len(tokenizer)).to(torch.bfloat16)
    asked = instances(requests_of("choices of a row"))
    expected, rounded = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **more).loglikelihood(asked, disable_tqdm=True) for more in ({"softmax_dtype": "float32"}, {})
    )
    found = scoring.Scorer(model, tokenizer, 512, 4).loglikelihood(asked, disable_tqdm=True)
    off = [max(abs(one[0] - other[0]) / -one[0] for one, other in zip(expected, answers, strict=True)) for answers in (found, rounded)]
    assert off[0] < 0.01 and all(float(torch.tensor(other[0]).bfloat16()) == other[0] for other in rounded)
    assert any(float(torch.tensor(one[0]).bfloat16()) != one[0] for one in found)


@pytest.mark.parametrize("odd", ["positions by length", "a window that is not known", "a cap on the logits"])
def test_a_model_that_cannot_share_is_scored_as_the_harness_does(odd, tokenizer, capsys):
    model = policy("gemma3" if odd == "a window that is not known" else "qwen3", len(tokenizer))
    if odd == "positions by length":
        model.config.rope_parameters["rope_type"] = "dynamic"
    if odd == "a cap on the logits":
        model.set_attn_implementation("eager")
    for layer in model.model.layers:
        if odd == "a window that is not known":
            # in its mask alone
            layer.self_attn.sliding_window = None
        elif odd == "a cap on the logits":
            layer.self_attn.register_forward_pre_hook(lambda module, args, given: (args, given | {"softcap": 30.0}), with_kwargs=True)
    pairs, prompts = requests_of("one letter"), [(f"{question} =", {"until": ["cat"], "max_gen_toks": 9}) for question, _ in requests_of("the same examples")[:6]]
    scorer, stock = scoring.Scorer(model, tokenizer, 512, 4), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    for found, expected in zip(scorer.loglikelihood(instances(pairs), disable_tqdm=True), stock.loglikelihood(instances(pairs), disable_tqdm=True), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    assert scorer.generate_until(instances(prompts, "generate_until"), disable_tqdm=True) == stock.generate_until(instances(prompts, "generate_until"), disable_tqdm=True)
    assert capsys.readouterr().out.count("cannot share prefixes") == 1


def test_what_a_generation_config_says_of_the_length_does_not_count(tokenizer):
    """Qwen's base models come with one that says 2,048 tokens, which transformers would take over a task's own number."""
    model = policy("qwen3", len(tokenizer))
    asked = instances([("red", {"until": ["nothing"], "max_gen_toks": 5})], "generate_until")
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)
    model.generation_config.max_new_tokens = 50
    scorer = scoring.Scorer(model, tokenizer, 512, 4)
    assert scorer.generate_until(asked, disable_tqdm=True) == expected
    scorer.can_share = False
    assert scorer.generate_until(asked, disable_tqdm=True) == expected


def policy(architecture: str, vocabulary: int):
    """With layers that see a window of 16 tokens, where the architecture has such."""
    model = make_policy(architecture, "sdpa", vocabulary).eval()
    if architecture == "gemma3":
        model.config.sliding_window = 16
        for layer in model.model.layers:
            if layer.self_attn.is_sliding:
                layer.self_attn.sliding_window = 16
        assert any(layer.self_attn.is_sliding for layer in model.model.layers)
    # random models are near to indifferent, and then all continuations are equally likely
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else None
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_depend_on_neither_budget_nor_order(architecture, tokenizer, monkeypatch):
    """Nor on how many attentions compute a batch: one a sequence, or one for all."""
    model = policy(architecture, len(tokenizer))
    pairs = [pair for kind in KINDS[:5] for pair in requests_of(kind)]
    expected = scoring.Scorer(model, tokenizer, 4096, 4).loglikelihood(instances(pairs), disable_tqdm=True)
    order = list(range(len(pairs)))
    random.Random(0).shuffle(order)
    for tokens, call in ((1, layouts.CALL), (100, layouts.CALL), (700, 0), (700, 2**40)):
        monkeypatch.setattr(layouts, "CALL", call)
        found = scoring.Scorer(model, tokenizer, tokens, 4).loglikelihood(instances([pairs[number] for number in order]), disable_tqdm=True)
        for number, answer in zip(order, found, strict=True):
            assert answer[0] == pytest.approx(expected[number][0], abs=1e-4) and answer[1] == expected[number][1]


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
    assert list(layouts.together(lengths, shared, 2**13)) == runs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_are_those_of_the_harness(architecture, tokenizer):
    model = policy(architecture, len(tokenizer))
    rng = random.Random(3)
    shots = text(rng, 40)
    prompts = [f"{shots} {text(rng, 2 + number % 9)}" for number in range(13)] + [text(rng, 1200)] + ["red"] * 2
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(
        instances([(prompt, {"until": ["cat", "dog bird"], "do_sample": False, "max_gen_toks": 40}) for prompt in prompts], "generate_until"), disable_tqdm=True
    )
    asked = instances([(prompt, {"until": ["cat", "dog bird"], "do_sample": False, "max_gen_toks": 40}) for prompt in prompts], "generate_until")
    for rows in (1, 3, 16):
        scorer = scoring.Scorer(model, tokenizer, 512, rows)
        # what HFLM writes with
        scorer._model_generate = None
        assert scorer.generate_until(asked, disable_tqdm=True) == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("bias", [(), (None,), (torch.randn(96),)], ids=["none given", "none", "one"])
def test_few_tokens_are_multiplied_as_many_are(bias, monkeypatch):
    tokens, weight, calls = torch.randn(2, 3, 48), torch.nn.Parameter(torch.randn(96, 48)), []
    with torch.no_grad():
        expected = torch.nn.functional.linear(tokens, weight, *bias)
        product = torch.mm
        monkeypatch.setattr(torch, "mm", lambda *given: calls.append(0) or product(*given))
        with scoring.FewTokens():
            found = torch.nn.functional.linear(tokens, weight, *bias)
            torch.nn.functional.linear(tokens.bfloat16(), torch.nn.Parameter(weight.bfloat16()))
    assert found.is_contiguous() and len(calls) == 1
    torch.testing.assert_close(found, expected)
