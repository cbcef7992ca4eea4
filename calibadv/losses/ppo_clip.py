"""The clipped surrogate loss."""

from __future__ import annotations

from torch import Tensor

from calibadv.interfaces import LossInputs, Metrics, PolicyLoss
from calibadv.numerics.loss import active_clips, clipped_surrogate


class PPOClip(PolicyLoss):
    """-(1/N) x sum over the trained tokens of min(r A, clip(r, 1 - low, 1 + high) A) (arXiv 1707.06347).

    Args:
        clip_low: How far the probability ratio may fall below 1 before a token has no gradient.
        clip_high: How far the probability ratio may rise above 1 before a token has no gradient.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.2) -> None:
        if not 0 < clip_low <= 1:
            raise ValueError(f"clip_low is {clip_low}; it must lie in (0, 1], as in 0.2")
        if clip_high <= 0:
            raise ValueError(f"clip_high is {clip_high}; it must be above 0, as in 0.2")
        self.clip_low = clip_low
        self.clip_high = clip_high

    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        """Compute the part of the loss that this micro-batch contributes.

        Args:
            inputs: N trained tokens.

        Returns:
            A scalar with gradient; and ``clip_low`` and ``clip_high``, the share of the mini-batch's trained tokens
            that are clipped on that side.
        """
        ratio = (inputs.logprobs - inputs.old_logprobs).exp()
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        loss = -clipped_surrogate(ratio, inputs.advantages, **clips).sum() / inputs.denominator
        low, high = active_clips(ratio.detach(), inputs.advantages, **clips)
        return loss, {
            "clip_low": low.sum().item() / inputs.denominator,
            "clip_high": high.sum().item() / inputs.denominator,
        }
