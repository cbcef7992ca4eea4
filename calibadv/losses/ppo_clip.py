"""The clipped surrogate loss."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from calibadv.batch import LossInputs
from calibadv.errors import UserError
from calibadv.interfaces import PolicyLoss
from calibadv.losses._clipping import check_clips, clip_fractions
from calibadv.losses.aggregation import Aggregation, TokenMean
from calibadv.numerics.losses import active_clips, clipped_surrogate, dual_clip_surrogate
from calibadv.numerics.ratio import bounded_exponent
from calibadv.types import Metrics

_USUAL_CLIPS = (0.2, 0.2)


class PPOClip(PolicyLoss):
    """-(1/N) x sum over the trained tokens of min(r A, clip(r, 1 - low, 1 + high) A) (arXiv 1707.06347).

    r = exp(logp - logp_old). A larger ``clip_high`` leaves more room to what was rewarded (DAPO, arXiv 2503.14476: 0.2
    and 0.28).

    Args:
        clip_low: How far the probability ratio may fall below 1 before a token has no gradient.
        clip_high: How far the probability ratio may rise above 1 before a token has no gradient.
        dual_clip: Where A < 0, the ratio above which a token has no gradient (arXiv 1912.09729: 3); none by default.
        aggregation: How tokens and rollouts are weighed; by default TokenMean, as in the formula.
    """

    def __init__(
        self,
        clip_low: float = _USUAL_CLIPS[0],
        clip_high: float = _USUAL_CLIPS[1],
        dual_clip: float | None = None,
        aggregation: Aggregation | None = None,
    ) -> None:
        check_clips(clip_low, clip_high)
        if dual_clip is not None and not dual_clip > 1:
            raise UserError(f"dual_clip is {dual_clip}; it must be above 1, as in 3.0, or null for none")
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip
        self.aggregation = aggregation or TokenMean()
        self.requires_multiple_updates = dual_clip is not None or (clip_low, clip_high) != _USUAL_CLIPS

    @override
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        ratio = bounded_exponent(inputs.logprobs - inputs.old_logprobs).exp()
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        surrogate = clipped_surrogate(ratio, inputs.advantages, **clips)
        metrics = clip_fractions(*active_clips(ratio.detach(), inputs.advantages, **clips), inputs)
        if self.dual_clip is not None:
            surrogate, bounded = dual_clip_surrogate(surrogate, inputs.advantages, self.dual_clip)
            metrics["dual_clip"] = bounded.sum().item() / inputs.denominator
        return -self.aggregation.reduce(surrogate, inputs), metrics
