"""lm-eval's Hugging Face model, sooner and with the same answers: what several requests begin with is computed once.

Requests are sorted by their tokens and laid into one row without padding: of each the tokens that the one before it does not begin with. The choices of a benchmark's
row, and rows behind the same examples, are then branches of a tree, of which a token sees those on its own path. The head is computed only where a token
of an answer is predicted. Texts that are generated have a slot each for their keys and values; one that has ended leaves its slot to the next.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from stages import InputError, checkpoints
from stages.attention import HALF, difference, is_plain
from stages.layouts import BY_LAYOUT, Beginnings, Layout, Slots, Tree
from stages.modeling import LOGITS, Policy, bare

T = TypeVar("T")

WORTH_SHARING = 8
"""Tokens: a shorter beginning is computed again."""
PLAIN = {"until", "max_gen_toks", "do_sample", "temperature"}
HARMLESS = {
    "eos_token_id", "pad_token_id", "bos_token_id", "max_length", "transformers_version", "_from_model_config", "do_sample", "temperature", "top_p", "top_k",
    "use_cache", "output_attentions", "output_hidden_states",
}  # fmt: skip
"""Settings of a generation config that greedy decoding has no use for."""
CACHED = 2**22
"""Logits that become log-probs at once: few enough for a processor's cache."""
FEW = 128
"""Tokens, at most, that weights are multiplied with: of SmolLM2-135M with eight texts, on two cores, a step took 0.7 to 0.9 of the time."""
ROUNDS = 8
"""Texts that are kept together once all are done, in multiples of those that are generated side by side; a killed run does at most so many again."""
REFILLED = 4
"""Free slots are filled once a fourth of all is free, so that beginnings are read several at once."""


class Scorer(HFLM):
    """Requests and answers are those of HFLM.

    Args:
        tokens_at_once: of a batch that is scored, and of beginnings that are read at once.
        rows_at_once: texts that are generated side by side.
        run: where what is done is kept, if that is wanted.
    """

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase, tokens_at_once: int, rows_at_once: int, run: Path | None = None) -> None:
        super().__init__(pretrained=policy, tokenizer=tokenizer, batch_size=rows_at_once, softmax_dtype="float32")
        # a task says how many, and this would override it
        bare(policy).generation_config.max_new_tokens = None
        self.tokens_at_once, self.rows_at_once, self.run = tokens_at_once, rows_at_once, run
        self.can_share: bool | None = None
        self.calls = 0

    def computed(self, plan: Sequence[T], compute: Callable[[T], Any]) -> list[Any]:
        """`compute` of each; a killed run goes on behind those that it had kept."""
        self.calls += 1
        folder = None if self.run is None else self.run / f"call-{self.calls}"
        return checkpoints.results(folder, len(plan), lambda done: map(compute, plan[done:]))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Of each (strings, context's tokens, continuation's tokens) the summed log-prob, in nats, and whether greedy decoding gives the continuation."""
        asked: dict[tuple[int, ...], list[int]] = {}
        cut = 0
        for number, (_, context, continuation) in enumerate(requests):
            assert context and 0 < len(continuation) <= self.max_length, f"request {number}: {len(context)} and {len(continuation)} tokens"
            whole = (*context, *continuation)
            cut += len(whole) > self.max_length + 1
            asked.setdefault(whole[-self.max_length - 1 : -1], []).append(number)
        if cut:
            print(f"{cut} of {len(requests)} requests are longer than the model's context of {self.max_length} tokens: they lose their beginning", flush=True)
        if not self.shares():
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        predicted = {tokens: sum(len(requests[number][2]) for number in numbers) for tokens, numbers in asked.items()}
        plan = list(batches(sorted(asked), predicted, self.tokens_at_once, LOGITS // len(self.tokenizer)))
        # the longest first: what does not fit into memory shows at once, and the time that is left is not understated
        plan.sort(key=lambda batch: -max(map(len, batch[0])))
        numbers = [[number for tokens in sequences for number in asked[tokens]] for sequences, _ in plan]
        with self.sharing(), tqdm(desc="requests", total=len(requests), disable=disable_tqdm) as bar:

            def compute(batch: tuple[list[tuple[int, ...]], list[int]]) -> list[tuple[float, bool]]:
                continuations = [[requests[number][2] for number in asked[tokens]] for tokens in batch[0]]
                answers = self.score(Tree(*batch, self.device), continuations)
                bar.update(len(answers))
                return answers

            found = self.computed(plan, compute)
        by_number = dict(zip(chain(*numbers), chain(*found), strict=True))
        return [tuple(by_number[number]) for number in range(len(requests))]

    def score(self, tree: Tree, continuations: list[list[list[int]]]) -> list[tuple[float, bool]]:
        """Of each sequence's continuations, whose last token is none of the sequence."""
        places = [path[len(path) - len(tokens) :] for path, of in zip(tree.paths, continuations, strict=True) for tokens in of]
        flat = [tokens for of in continuations for tokens in of]
        wanted, row = np.unique(np.concatenate(places), return_inverse=True)
        logits = self.logits(tree, tree.ids, tree.positions, torch.from_numpy(wanted))
        row, following = torch.from_numpy(row).to(self.device), torch.tensor([token for tokens in flat for token in tokens], device=self.device)
        for some in logits.split(max(1, CACHED // logits.shape[1])):
            some.copy_(some.log_softmax(dim=1))
        log_probs = logits[row, following].cpu()
        greedy = (logits.argmax(dim=1)[row] == following).cpu()
        lengths = [len(tokens) for tokens in flat]
        return [(float(values.sum()), bool(same.all())) for values, same in zip(log_probs.split(lengths), greedy.split(lengths), strict=True)]

    def logits(self, layout: Layout, ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """(wanted places, vocabulary) in float32, of one row of tokens, (1, tokens)."""
        with torch.no_grad(), FewTokens() if ids.device.type == "cpu" and ids.shape[1] <= FEW else nullcontext():
            found = self.model(input_ids=ids, position_ids=positions, layout=layout, logits_to_keep=wanted.to(ids.device), use_cache=False)
        return found.logits[0].float()

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Within, the model's attention asks for a layout."""
        model = bare(self.model)
        own = model.config._attn_implementation
        model.set_attn_implementation(BY_LAYOUT)
        try:
            yield
        finally:
            model.set_attn_implementation(own)

    def shares(self) -> bool:
        """Whether the model gives two branches of a tree the logits that it gives each alone. Tried once."""
        if self.can_share is None:

            def together(text: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
                tree = Tree([text.tolist(), branch.tolist()], [0, HALF], self.device)
                with self.sharing():
                    return self.logits(tree, tree.ids, tree.positions, torch.arange(tree.ids.shape[1]))[np.concatenate(tree.paths)]

            plain = is_plain(bare(self.model).config.get_text_config())
            reason = difference(self.model, together) if plain else "its layers do not all attend to what comes before, at fixed positions"
            self.can_share = reason is None
            if reason is not None:
                print(f"{type(bare(self.model)).__name__} cannot share prefixes ({reason}): it is scored as lm-eval does, which takes longer", flush=True)
        return self.can_share

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As HFLM's: what greedy decoding writes up to a stop string. Sampling, and decoding with penalties or a search, are left to HFLM."""
        asked = [(context, normalize_gen_kwargs(given, self.max_gen_toks)) for context, given in (request.args for request in requests)]
        config = bare(self.model).generation_config
        odd = {key for _, kwargs in asked for key in kwargs.keys() - PLAIN | ({"do_sample"} if kwargs.get("do_sample") else set())} | config.to_diff_dict().keys() - HARMLESS
        if odd:
            print(f"texts are generated as lm-eval does, which takes longer, because of {', '.join(sorted(odd))}", flush=True)
        prompts = [self.prompt(context, kwargs["max_gen_toks"]) for context, kwargs in asked]
        if odd or not self.shares():
            # side by side, a text that has ended goes on until all have, and what is cut off then is not the same
            self.batch_size_per_gpu = 1
            return super().generate_until(requests, disable_tqdm)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        ends = set(np.atleast_1d(config.eos_token_id).tolist()) if config.eos_token_id is not None else set()
        by_kind: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for number, (_, kwargs) in enumerate(asked):
            kind = (kwargs["max_gen_toks"], *handle_stop_sequences(kwargs["until"], eos))
            by_kind.setdefault(kind, {}).setdefault(prompts[number], []).append(number)
        size = self.rows_at_once * ROUNDS
        plan = [(kind, sorted(of)[start : start + size]) for kind, of in sorted(by_kind.items()) for start in range(0, len(of), size)]
        with self.sharing(), tqdm(desc="texts", total=len(requests), disable=disable_tqdm) as bar:

            def compute(part: tuple[tuple, list[tuple[int, ...]]]) -> list[str]:
                (new_tokens, *stops), own = part
                texts = {}
                for prompt, tokens in self.write(own, new_tokens, stops, ends):
                    texts[prompt] = postprocess_generated_text(self.tok_decode(tokens), stops, None)
                    bar.update(len(by_kind[part[0]][prompt]))
                return [texts[prompt] for prompt in own]

            found = self.computed(plan, compute)
        by_number = {number: text for (kind, own), texts in zip(plan, found, strict=True) for prompt, text in zip(own, texts, strict=True) for number in by_kind[kind][prompt]}
        return [by_number[number] for number in range(len(requests))]

    def prompt(self, context: str, new_tokens: int) -> tuple[int, ...]:
        """Its tokens, the last ones if it has too many."""
        if new_tokens >= self.max_length:
            raise InputError(f"max_gen_toks: found {new_tokens}, expected fewer than the model's context of {self.max_length}")
        return tuple(self.tok_batch_encode([context], left_truncate_len=self.max_length - new_tokens, truncation=self.truncation)[0][0].tolist())

    def write(self, prompts: list[tuple[int, ...]], new_tokens: int, stops: list[str], ends: set[int]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Each of the sorted prompts with the tokens that follow it, as they end."""
        tail = max(len(stop.encode()) for stop in stops) + 2
        slots = Slots(min(self.rows_at_once, len(prompts)), max(map(len, prompts)) + new_tokens)
        waiting, active = deque(prompts), []
        while waiting or active:
            free = slots.slots - len(active)
            if waiting and free >= min(len(waiting), -(-slots.slots // REFILLED)):
                sequences, shared = next(batches([waiting[number] for number in range(min(free, len(waiting)))], dict.fromkeys(waiting, 1), self.tokens_at_once, LOGITS // len(self.tokenizer)))
                tree = Tree(sequences, shared, self.device)
                last = np.array([path[-1] for path in tree.paths])
                following = self.logits(Beginnings(tree, slots, len(active)), tree.ids, tree.positions, torch.from_numpy(last)).argmax(dim=1).tolist()
                active += [(waiting.popleft(), [token]) for token in following]
            else:
                ids = torch.tensor([[tokens[-1] for _, tokens in active]], device=self.device)
                positions = torch.tensor([len(prompt) + len(tokens) - 1 for prompt, tokens in active], device=self.device)
                slots.begin(positions)
                following = self.logits(slots, ids, positions[None], torch.arange(len(active))).argmax(dim=1).tolist()
                for (_, tokens), token in zip(active, following, strict=True):
                    tokens.append(token)
            texts = self.tokenizer.batch_decode([tokens[-tail:] for _, tokens in active])
            for slot in reversed(range(len(active))):
                prompt, tokens = active[slot]
                if tokens[-1] in ends or len(tokens) == new_tokens or any(stop in texts[slot] for stop in stops):
                    yield prompt, tokens
                    last = active.pop()
                    if slot < len(active):
                        active[slot] = last
                        slots.move(len(active), slot)


class FewTokens(TorchFunctionMode):
    """Within, layers multiply their weights with the tokens, not the tokens with the weights: the same products, for which MKL takes less time where tokens are few."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function is linear and not kwargs and args[0].dtype == torch.float32 and args[0].dim() > 1 and type(args[1]) is torch.nn.Parameter:
            # a router of experts gives no bias, not even None
            tokens, weight, bias = (*args, None)[:3]
            found = torch.mm(weight, tokens.flatten(0, -2).t()).t().contiguous().unflatten(0, tokens.shape[:-1])
            return found if bias is None else found + bias
        return function(*args, **(kwargs or {}))


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for count, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return count
    return min(len(one), len(other))


def batches(sequences: list[tuple[int, ...]], predicted: dict[tuple[int, ...], int], most: int, most_predicted: int) -> Iterator[tuple[list[tuple[int, ...]], list[int]]]:
    """Runs of the sorted sequences, and of each sequence how many tokens it shares with the one before, within as many tokens, and as many predicted ones.

    For what goes on from a long beginning there is room for three times as much, lest that be computed again for each few sequences.
    """
    run: list[tuple[int, ...]] = []
    shared: list[int] = []
    total = total_predicted = longest = 0
    for tokens in sequences:
        common = in_common(run[-1], tokens) if run else 0
        common = common if common >= WORTH_SHARING else 0
        more, asked = len(tokens) - common, predicted[tokens]
        if run and (total + more > (max(most, 4 * longest) if common else most) or total_predicted + asked > most_predicted):
            yield run, shared
            run, shared, common, more = [], [], 0, len(tokens)
            total = total_predicted = longest = 0
        run.append(tokens)
        shared.append(common)
        total, total_predicted, longest = total + more, total_predicted + asked, max(longest, len(tokens))
    if run:
        yield run, shared
