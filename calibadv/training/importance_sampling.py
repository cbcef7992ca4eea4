"""Truncated importance weights between the distribution that was sampled from and the one that is trained."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from calibadv.numerics.masked import check_shapes
from calibadv.numerics.ratio import bounded_exponent


def truncated_weights(
    logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, level: Literal["token", "sequence"], cap: float
) -> Tensor:
    """Weight tokens by how likely the trainer's model is to draw them, compared with the engine that drew them.

    min(exp(logp_trainer - logp_engine), cap), without gradient; per token, or of the sums over a rollout's tokens
    (truncated importance sampling; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training", as collected).
    """
    check_shapes("B T, B T, B T", logprobs, sampled_logprobs, mask)
    difference = torch.where(mask, logprobs - sampled_logprobs, 0.0).detach()
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True).expand_as(difference)
    return torch.where(mask, bounded_exponent(difference).exp().clamp(max=cap), 1.0)
