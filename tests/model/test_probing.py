"""The probe tells a model that keeps two sequences of a row apart from one that does not."""

import pytest
import torch

from reprotune.model.probing import LOGIT_TOLERANCE, PROBE_LENGTH, SHARED_PREFIX, row_mismatch
from tests.tiny import make_policy


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def policy(request):
    return make_policy("qwen3", "sdpa").to(request.param).eval()


def logits_alone(policy, *sequences):
    return torch.cat([policy(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences])


def test_the_same_logits_match(policy):
    def check(first, second):
        assert len(first) == len(second) == PROBE_LENGTH
        assert [a == b for a, b in zip(first, second, strict=True)].count(True) == SHARED_PREFIX
        return logits_alone(policy, first, second)

    assert row_mismatch(policy, check) is None


def test_other_logits_are_a_mismatch(policy):
    largest = 2 * LOGIT_TOLERANCE[policy.dtype]

    def off(first, second):
        logits = logits_alone(policy, first, second)
        logits[-1, -1] += largest
        return logits

    assert row_mismatch(policy, off) == f"a logit differs by {largest:.2g}"


def test_an_error_is_a_mismatch(policy):
    def refused(first, second):
        raise NotImplementedError("its attention was given softcap\nand more")

    assert row_mismatch(policy, refused) == "NotImplementedError: its attention was given softcap"


def test_logits_that_are_not_numbers_are_a_mismatch(policy):
    assert row_mismatch(policy, lambda *both: logits_alone(policy, *both) * torch.nan)
