from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from calibadv.numerics.logprobs import entropy, token_logprobs


def test_token_logprobs_by_hand() -> None:
    # softmax of (ln 1, ln 2, ln 5) is (1/8, 2/8, 5/8)
    logits = torch.tensor([1.0, 2.0, 5.0]).log().repeat(3, 1)
    assert_close(token_logprobs(logits, torch.tensor([0, 1, 2])).exp(), torch.tensor([0.125, 0.25, 0.625]))


def test_log_probabilities_are_computed_in_float32() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.tensor([3, 0, 49, 7])
    exact = torch.log_softmax(logits.double(), -1)
    values = token_logprobs(logits, ids)
    assert values.dtype == torch.float32
    assert_close(values, exact[range(4), ids].float())
    assert_close(entropy(logits), -(exact.exp() * exact).sum(-1).float())


def test_token_logprobs_has_the_gradient_of_the_softmax() -> None:
    logits = torch.tensor([1.0, 2.0, 5.0]).log()[None].requires_grad_()
    token_logprobs(logits, torch.tensor([1])).sum().backward()
    assert_close(logits.grad, torch.tensor([[-0.125, 0.75, -0.625]]))  # one-hot minus softmax


def test_entropy_by_hand() -> None:
    certain = [0.0, -math.inf, -math.inf, -math.inf]
    assert_close(entropy(torch.tensor([[1.0] * 4, certain])), torch.tensor([math.log(4), 0.0]))
