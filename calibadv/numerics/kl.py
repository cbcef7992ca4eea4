"""Estimates of the Kullback-Leibler divergence from samples."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.shapes import check_shapes


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-d) + d - 1 with d = logp - logp_ref: unbiased for KL(policy || reference), and never negative.

    Schulman, "Approximating KL divergence" (2020).

    Args:
        logprobs: [N] of the policy, for tokens that it drew.
        reference_logprobs: [N] of the reference.

    Returns:
        [N], with gradient.
    """
    check_shapes("N, N", logprobs, reference_logprobs)
    difference = logprobs - reference_logprobs
    return torch.expm1(-difference) + difference
