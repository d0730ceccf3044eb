"""Rows of few tokens are computed weight first, with the same products."""

import pytest
import torch

from reprotune.compat.torch import TransposedLinear


@pytest.mark.parametrize("bias", [(), (None,), (torch.randn(96),)], ids=["none given", "none", "one"])
def test_few_tokens_are_multiplied_as_many_are(bias, monkeypatch):
    tokens, weight, calls = torch.randn(2, 3, 48), torch.nn.Parameter(torch.randn(96, 48)), []
    with torch.no_grad():
        expected = torch.nn.functional.linear(tokens, weight, *bias)
        product = torch.mm
        monkeypatch.setattr(torch, "mm", lambda *arguments: calls.append(0) or product(*arguments))
        with TransposedLinear():
            result = torch.nn.functional.linear(tokens, weight, *bias)
            torch.nn.functional.linear(tokens.bfloat16(), torch.nn.Parameter(weight.bfloat16()))
    assert result.is_contiguous() and len(calls) == 1
    torch.testing.assert_close(result, expected)
