"""Tiny models of several architectures, and requests that share prefixes in many ways."""

import random

import torch
from lm_eval.api.instance import Instance

from tests.tiny import WORDS, make_policy

ARCHITECTURES = ("qwen3", "llama", "gemma3")
KINDS = (
    "choices of a row",
    "the same examples",
    "one letter",
    "choices that begin alike",
    "contexts with an end in common",
    "duplicates and nothing before",
    "longer than the model",
)


def policy(architecture: str, vocabulary: int):
    """A random model; where the architecture has sliding windows, they are 16 tokens wide."""
    model = make_policy(architecture, "sdpa", vocabulary).eval()
    if architecture == "gemma3":
        model.config.sliding_window = 16
        for layer in model.model.layers:
            if layer.self_attn.is_sliding:
                layer.self_attn.sliding_window = 16
        assert any(layer.self_attn.is_sliding for layer in model.model.layers)
    # a random model is nearly indifferent: larger weights make continuations differ in likelihood
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() > 1 else None
    return model


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def requests_of(kind: str) -> list[tuple[str, str]]:
    """Contexts and continuations of one of KINDS."""
    rng = random.Random(kind)
    shots = "".join(f"{text(rng, 9)} = {text(rng, 2)}\n\n" for _ in range(12))
    if kind == "choices of a row":
        contexts = (text(rng, 12) for _ in range(9))
        return [(context, f" {text(rng, length)}") for context in contexts for length in (1, 3, 8, 5)]
    if kind == "the same examples":
        questions = (text(rng, 6) for _ in range(8))
        return [(f"{shots}{question} =", f" {text(rng, 2)}") for question in questions for _ in range(3)]
    if kind == "one letter":
        questions = (text(rng, 6) for _ in range(8))
        return [(f"{shots}{question}\nAnswer:", f" {letter}") for question in questions for letter in "ABCD"]
    if kind == "choices that begin alike":
        starts, ends = ("the cat", "the big cat", ""), ("runs", "runs home", "runs home now", "sleeps")
        return [(f"{shots}say", f" {start} {end}") for start in starts for end in ends]
    if kind == "contexts with an end in common":
        return [(f"{text(rng, 3)} {shots}", "red") for _ in range(5)]
    if kind == "duplicates and nothing before":
        duplicates = [("", text(rng, 5))] * 3 + [("", "a")] + [("red", " cat")] * 2
        return [*duplicates, ("red ", "cat"), ("red  ", " "), ("red", " ")]
    assert kind == "longer than the model"
    long = [(f"{text(rng, 1200)} {end}", f" {text(rng, 3)}") for end in ("one", "two") for _ in range(2)]
    return [*long, ("red", " cat")]


def instances(pairs: list[tuple], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]


def generations(prompts: list[str], **arguments) -> list[Instance]:
    return instances([(prompt, dict(arguments)) for prompt in prompts], "generate_until")
