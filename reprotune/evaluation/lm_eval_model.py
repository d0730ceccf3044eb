"""lm-eval's Hugging Face model, with the same answers in less time.

Requests that share a prefix are scored as one tree: the prefix is computed once. The LM head computes only
the logits that answers need.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from reprotune.compat.lm_eval import Answer, Request, TokenScorer, let_tasks_limit_length
from reprotune.errors import InputError
from reprotune.evaluation import generation
from reprotune.evaluation.batching import Batch, Tokens, batches, prediction_limit
from reprotune.evaluation.forward import SharedForward
from reprotune.evaluation.generation import Generator, StopRule
from reprotune.model.policies import Policy, bare
from reprotune.model.shared_prefixes import PrefixTree
from reprotune.training import checkpoints

T = TypeVar("T")
R = TypeVar("R")

CACHED_LOGITS = 2**22
"""Logits that are normalized together: few enough for a processor's cache."""


class Scorer(TokenScorer):
    """lm-eval's HFLM; a model that cannot share prefixes is left to HFLM's own code.

    Args:
        tokens_at_once: tokens of a batch that is scored, and of prompts that are prefilled together.
        rows_at_once: sequences that are generated together.
        run: folder for checkpoints; None keeps none.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        tokens_at_once: int,
        rows_at_once: int,
        run: Path | None = None,
    ) -> None:
        super().__init__(
            pretrained=policy, tokenizer=tokenizer, batch_size=rows_at_once, softmax_dtype="float32"
        )
        let_tasks_limit_length(bare(policy))
        self.forward = SharedForward(self.model)
        self.tokens_at_once, self.rows_at_once, self.run = tokens_at_once, rows_at_once, run
        self.calls = 0

    def resumable(self, plan: Sequence[T], compute: Callable[[T], R]) -> list[R]:
        """Compute each part of the plan; a killed run resumes behind the parts that it saved."""
        self.calls += 1
        folder = None if self.run is None else self.run / f"call-{self.calls}"
        return checkpoints.results(folder, len(plan), lambda done: map(compute, plan[done:]))

    def score_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[Answer]:
        numbers = self.by_sequence(requests)
        if not self.forward.shares():
            return super().score_tokens(requests, disable_tqdm)
        predicted = {
            tokens: sum(len(requests[number][2]) for number in same) for tokens, same in numbers.items()
        }
        max_predicted = prediction_limit(len(self.tokenizer))
        plan = list(batches(sorted(numbers), predicted, self.tokens_at_once, max_predicted))
        # longest first: what does not fit into memory fails at once, and the time left is not understated
        plan.sort(key=lambda batch: -max(map(len, batch[0])))
        with self.forward.sharing(), tqdm(desc="requests", total=len(requests), disable=disable_tqdm) as bar:

            def compute(batch: Batch) -> list[Answer]:
                continuations = [[requests[number][2] for number in numbers[tokens]] for tokens in batch[0]]
                answers = self.score(PrefixTree(*batch, self.device), continuations)
                bar.update(len(answers))
                return answers

            answers = chain(*self.resumable(plan, compute))
        order = [number for sequences, _ in plan for tokens in sequences for number in numbers[tokens]]
        by_number = dict(zip(order, answers, strict=True))
        # answers from a checkpoint are lists
        return [(by_number[number][0], by_number[number][1]) for number in range(len(requests))]

    def by_sequence(self, requests: list[Request]) -> dict[Tokens, list[int]]:
        """The numbers of the requests for each sequence of tokens that the model reads.

        It reads context and continuation without the last token, which is only predicted. A request longer
        than its context loses its first tokens.
        """
        numbers: dict[Tokens, list[int]] = {}
        cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            assert context and 0 < len(continuation) <= self.max_length, (
                f"request {number}: {len(context)} tokens of context and {len(continuation)} of continuation"
            )
            whole = (*context, *continuation)
            cut += len(whole) > self.max_length + 1
            numbers.setdefault(whole[-self.max_length - 1 : -1], []).append(number)
        if cut:
            print(
                f"{cut} of {len(requests)} requests are longer than the model's context of {self.max_length} "
                "tokens: their first tokens are cut off",
                flush=True,
            )
        return numbers

    def score(self, tree: PrefixTree, continuations: list[list[list[int]]]) -> list[Answer]:
        """Answer the requests of a tree, in its order.

        Args:
            continuations: of each sequence, one or several. The last token of each is not in the sequence.
        """
        flat = [tokens for same in continuations for tokens in same]
        places = [
            path[len(path) - len(tokens) :]
            for path, same in zip(tree.paths, continuations, strict=True)
            for tokens in same
        ]
        wanted, inverse = np.unique(np.concatenate(places), return_inverse=True)
        logits = self.forward.logits(tree, tree.ids, tree.positions, torch.from_numpy(wanted))
        row = torch.from_numpy(inverse).to(self.device)
        predicted = torch.tensor([token for tokens in flat for token in tokens], device=self.device)
        for part in logits.split(max(1, CACHED_LOGITS // logits.shape[1])):
            part.copy_(part.log_softmax(dim=1))
        log_probs = logits[row, predicted].cpu()
        greedy = (logits.argmax(dim=1)[row] == predicted).cpu()
        lengths = [len(tokens) for tokens in flat]
        return [
            (float(of_continuation.sum()), bool(matches.all()))
            for of_continuation, matches in zip(log_probs.split(lengths), greedy.split(lengths), strict=True)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy decoding up to a stop string; what asks for sampling, penalties or beams is left to HFLM."""
        arguments = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        unsupported = generation.unsupported(arguments, bare(self.model).generation_config)
        if unsupported:
            print(
                "lm-eval's own code generates, which takes longer, because of "
                f"{', '.join(sorted(unsupported))}",
                flush=True,
            )
        prompts = [
            self.prompt(request.args[0], kwargs["max_gen_toks"])
            for request, kwargs in zip(requests, arguments, strict=True)
        ]
        if unsupported or not self.forward.shares():
            return self.generate_one_by_one(requests, disable_tqdm)
        return self.generate(prompts, arguments, disable_tqdm)

    def generate(
        self, prompts: list[Tokens], arguments: list[Mapping[str, Any]], disable_tqdm: bool
    ) -> list[str]:
        """The generation of each prompt, by its request's arguments; equal requests are computed once."""
        eos_text = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        numbers: dict[StopRule, dict[Tokens, list[int]]] = {}
        for number, (prompt, kwargs) in enumerate(zip(prompts, arguments, strict=True)):
            strings = tuple(handle_stop_sequences(kwargs["until"], eos_text))
            same_rule = numbers.setdefault(StopRule(kwargs["max_gen_toks"], strings), {})
            same_rule.setdefault(prompt, []).append(number)
        eos = bare(self.model).generation_config.eos_token_id
        eos_ids = set() if eos is None else set(np.atleast_1d(eos).tolist())
        generator = Generator(self.forward, self.tokenizer, eos_ids, self.tokens_at_once, self.rows_at_once)
        plan = generation.plan(numbers, self.rows_at_once)
        with (
            self.forward.sharing(),
            tqdm(desc="generations", total=len(prompts), disable=disable_tqdm) as bar,
        ):

            def compute(batch: tuple[StopRule, list[Tokens]]) -> list[str]:
                rule, batch_prompts = batch
                texts = {}
                for prompt, tokens in generator.generate(batch_prompts, rule):
                    text = self.tok_decode(tokens)
                    texts[prompt] = postprocess_generated_text(text, list(rule.strings), None)
                    bar.update(len(numbers[rule][prompt]))
                return [texts[prompt] for prompt in batch_prompts]

            texts = chain(*self.resumable(plan, compute))
        order = [numbers[rule][prompt] for rule, batch_prompts in plan for prompt in batch_prompts]
        by_number = {number: text for same, text in zip(order, texts, strict=True) for number in same}
        return [by_number[number] for number in range(len(prompts))]

    def prompt(self, context: str, new_tokens: int) -> Tokens:
        """The last tokens of a prompt that leave room for `new_tokens` in the model's context.

        Raises:
            InputError: there is no room.
        """
        if new_tokens >= self.max_length:
            raise InputError(
                f"max_gen_toks: found {new_tokens}, expected fewer than the model's context of "
                f"{self.max_length}"
            )
        ids, _ = self.tok_batch_encode(
            [context], left_truncate_len=self.max_length - new_tokens, truncation=self.truncation
        )
        return tuple(ids[0].tolist())
