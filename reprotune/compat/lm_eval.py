"""lm-eval: the private hook of its Hugging Face model, and settings that it leaves to its caller."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context and continuation as text, the context's tokens, the continuation's tokens)."""
Answer = tuple[float, bool]
"""Summed log-prob of a continuation in nats, and whether greedy decoding gives it."""


class TokenScorer(HFLM):
    """lm-eval's Hugging Face model, with a public name for its private method that scores tokenized requests.

    Seen with lm-eval 0.4.13.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        return self.score_tokens(requests, disable_tqdm)

    def score_tokens(self, requests: list[Request], disable_tqdm: bool) -> list[Answer]:
        """As lm-eval does: one padded row for each request."""
        return super()._loglikelihood_tokens(requests, disable_tqdm)

    def generate_one_by_one(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        """As lm-eval does, without batches.

        In a batch, a finished sequence goes on until all are finished, and what is cut off then can differ
        (https://github.com/EleutherAI/lm-evaluation-harness/issues/2723).
        """
        self.batch_size_per_gpu = 1
        return super().generate_until(requests, disable_tqdm)


def let_tasks_limit_length(model: PreTrainedModel) -> None:
    """Drop the model's own `max_new_tokens`, which overrides the length that a task asks for.

    lm-eval passes a task's length as `max_length`, and transformers prefers the other
    (https://github.com/EleutherAI/lm-evaluation-harness/issues/2070). Seen with transformers 5.23.0 and
    lm-eval 0.4.13.
    """
    model.generation_config.max_new_tokens = None


def seed_language_detection(seed: int) -> None:
    """Seed langdetect, if a task has imported it.

    IFEval's checkers ask it for the language of a response, and it draws at random
    (https://github.com/EleutherAI/lm-evaluation-harness/issues/4213). Seen with lm-eval 0.4.13 and langdetect
    1.0.9.
    """
    if langdetect := sys.modules.get("langdetect"):
        langdetect.DetectorFactory.seed = seed


@contextmanager
def without_environment() -> Iterator[None]:
    """Inside a `with` block, lm-eval does not list this machine's packages and devices.

    It adds them to its results, where nobody reads them here, and starts `pip` for it, which takes more than
    half a second. Seen with lm-eval 0.4.13.
    """
    with patch.object(evaluator, "add_env_info", lambda results: None):
        yield
