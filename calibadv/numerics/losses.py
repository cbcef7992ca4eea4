"""Terms of the policy losses, per token: probability ratios, and surrogates that bound them."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.masked import check_shapes, group_sum
from calibadv.numerics.ratio import bounded_exponent


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): what PPO maximises (arXiv 1707.06347).

    Args:
        ratio: [N] exp(logp - logp_old).
        advantages: [N].
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.

    Returns:
        [N], with the gradient of ``ratio`` where the clip is not active.
    """
    check_shapes("N, N", ratio, advantages)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def active_clips(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Find the tokens whose clipped term is the smaller one, so that they have no gradient.

    Args:
        ratio: [N] exp(logp - logp_old).
        advantages: [N].
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.

    Returns:
        [N] bool for the low side (negative advantage, ratio below 1 - clip_low) and [N] bool for the high side.
    """
    check_shapes("N, N", ratio, advantages)
    return (advantages < 0) & (ratio < 1 - clip_low), (advantages > 0) & (ratio > 1 + clip_high)


def dual_clip_surrogate(surrogate: Tensor, advantages: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """max(surrogate, bound x A) where A < 0: a limit to what one penalized token can weigh (arXiv 1912.09729).

    The clip of PPO leaves the ratio of a penalized token unbounded from above: one that has become much likelier since
    it was drawn outweighs all others.

    Args:
        surrogate: [N] of ``clipped_surrogate``.
        advantages: [N].
        bound: of the ratio, above 1.

    Returns:
        [N], without gradient where the bound holds; and [N] bool, where it does.
    """
    check_shapes("N, N", surrogate, advantages)
    bounded = (advantages < 0) & (surrogate.detach() < bound * advantages)
    return torch.where(bounded, bound * advantages, surrogate), bounded


def cispo_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """CISPO's w A logp with a weight without gradient, w = clip(r, 1 - clip_low, 1 + clip_high) (arXiv 2506.13585).

    Args:
        logprobs: [N] of the policy now.
        old_logprobs: [N] of the policy that r = exp(logp - logp_old) compares with.
        advantages: [N].
        clip_low: how far the weight may fall below 1.
        clip_high: how far it may rise above 1.

    Returns:
        [N], whose gradient is w A for every token; and [N] bool each, where a token with an advantage has a weight
        that is cut from below and from above.
    """
    check_shapes("N, N, N", logprobs, old_logprobs, advantages)
    ratio = bounded_exponent(logprobs.detach() - old_logprobs).exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    matters = advantages != 0
    return weight * advantages * logprobs, matters & (ratio < 1 - clip_low), matters & (ratio > 1 + clip_high)


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, rollout_ids: Tensor) -> Tensor:
    """exp(mean over the tokens of a rollout of logp - logp_old), for each of its tokens (GSPO, arXiv 2507.18071).

    The value is the rollout's, the gradient that of the token's own logp (the paper's GSPO-token): where the tokens of
    a rollout have one advantage, the sum of their gradients is that of the ratio of the whole rollout; where they do
    not, every token follows its own.

    Args:
        logprobs: [N] of the policy now.
        old_logprobs: [N] of the policy that is compared with.
        rollout_ids: [N] rollout of each token; equal numbers are one rollout.

    Returns:
        [N].
    """
    check_shapes("N, N, N", logprobs, old_logprobs, rollout_ids)
    fixed = logprobs.detach()
    means = group_sum(fixed - old_logprobs, rollout_ids) / group_sum(torch.ones_like(fixed), rollout_ids).clamp(min=1)
    return bounded_exponent(means.to(fixed)[rollout_ids] + (logprobs - fixed)).exp()
