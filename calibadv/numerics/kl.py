"""Estimates of the Kullback-Leibler divergence from samples.

Schulman, "Approximating KL divergence" (2020), with d = logp - logp_ref for tokens that the policy drew. What an
estimate says as a *value* and what it does as a *term of the loss* are two things. The gradient of KL(policy ||
reference) is the mean of d x grad logp. That of k2 is just this. That of k3, (1 - exp(-d)) x grad logp, is in the mean
the gradient of KL(reference || policy), and the same to first order near the reference. That of k1 is grad logp,
whatever the reference says: its mean is 0, and what is left of it is noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from calibadv.numerics.masked import check_shapes
from calibadv.numerics.ratio import bounded_exponent

KLEstimator = Literal["k1", "k2", "k3"]


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """d: unbiased for KL(policy || reference), of either sign; its gradient does not depend on the reference.

    Args:
        logprobs: [N] of the policy, for tokens that it drew.
        reference_logprobs: [N] of the reference.

    Returns:
        [N], with gradient.
    """
    check_shapes("N, N", logprobs, reference_logprobs)
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative; its gradient is unbiased for that of KL(policy || reference).

    Args:
        logprobs: [N] of the policy, for tokens that it drew.
        reference_logprobs: [N] of the reference.

    Returns:
        [N], with gradient.
    """
    check_shapes("N, N", logprobs, reference_logprobs)
    return (logprobs - reference_logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-d) + d - 1: unbiased for KL(policy || reference), and never negative.

    The exponent is bounded to +-20 (``bounded_exponent``): below d = -20 the value grows no further, but for d itself,
    and the gradient stays 1 - exp(20), which pulls the policy back.

    Args:
        logprobs: [N] of the policy, for tokens that it drew.
        reference_logprobs: [N] of the reference.

    Returns:
        [N], with gradient.
    """
    check_shapes("N, N", logprobs, reference_logprobs)
    difference = logprobs - reference_logprobs
    return torch.expm1(bounded_exponent(-difference)) + difference


KL_ESTIMATORS: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
