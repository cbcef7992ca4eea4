from __future__ import annotations

import torch
from torch.testing import assert_close

from calibadv.numerics.kl import k3


def test_k3_by_hand() -> None:
    # d = ln 0.5 - ln 0.25 = ln 2: exp(-d) + d - 1 = 0.5 + 0.693147 - 1; and 0 for equal log-probabilities
    values = k3(torch.tensor([0.5, 0.3]).log(), torch.tensor([0.25, 0.3]).log())
    assert_close(values, torch.tensor([0.193147, 0.0]))


def test_k3_is_unbiased() -> None:
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = (policy * (policy / reference).log()).sum()
    assert_close((policy * k3(policy.log(), reference.log())).sum(), expected)
