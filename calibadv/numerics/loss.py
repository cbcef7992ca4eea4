"""The clipped surrogate of PPO (arXiv 1707.06347), per token."""

from __future__ import annotations

import torch
from torch import Tensor

from calibadv.numerics.shapes import check_shapes


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): what is maximised.

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
    """Where the clipped term is the smaller one, so that the token has no gradient.

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
