"""One probability ratio per rollout."""

from __future__ import annotations

import logging

from torch import Tensor
from typing_extensions import override

from calibadv.batch import LossInputs
from calibadv.interfaces import PolicyLoss
from calibadv.losses._clipping import check_clips, clip_fractions
from calibadv.losses.aggregation import Aggregation, TokenMean
from calibadv.numerics.losses import active_clips, clipped_surrogate, sequence_ratio
from calibadv.types import Metrics

log = logging.getLogger(__name__)

# A mean over a rollout moves by thousandths: a clip of PPO's size is never reached.
_LARGE_CLIP = 0.1


class GSPO(PolicyLoss):
    """-mean of min(s A, clip(s, 1 - low, 1 + high) A), s = exp(mean over a rollout of logp - logp_old).

    From arXiv 2507.18071, in its form for advantages that differ within a rollout (GSPO-token): all tokens of a rollout
    have the value of s, and are clipped together or not at all, but each follows its own advantage. Where all tokens of
    a rollout have one advantage, that is GSPO itself. The paper weighs every rollout the same: SequenceMean.

    Args:
        clip_low: How far the ratio of a rollout may fall below 1 before its tokens have no gradient.
        clip_high: How far the ratio of a rollout may rise above 1 before its tokens have no gradient.
        aggregation: How tokens and rollouts are weighed; TokenMean by default, as in the other losses.
    """

    requires_multiple_updates = True

    def __init__(self, clip_low: float = 3e-4, clip_high: float = 4e-4, aggregation: Aggregation | None = None) -> None:
        check_clips(clip_low, clip_high)
        if max(clip_low, clip_high) > _LARGE_CLIP:
            log.warning(
                "the clips of GSPO are %s and %s: its ratio is a mean over a rollout, which hardly moves that far; "
                "nothing will be clipped; the paper has 3e-4 and 4e-4",
                clip_low,
                clip_high,
            )
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.aggregation = aggregation or TokenMean()

    @override
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        ratio = sequence_ratio(inputs.logprobs, inputs.old_logprobs, inputs.rollout_ids)
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        loss = -self.aggregation.reduce(clipped_surrogate(ratio, inputs.advantages, **clips), inputs)
        return loss, clip_fractions(*active_clips(ratio.detach(), inputs.advantages, **clips), inputs)
