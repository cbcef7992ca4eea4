"""Clipped importance weights instead of clipped updates."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from calibadv.batch import LossInputs
from calibadv.interfaces import PolicyLoss
from calibadv.losses._clipping import check_clips, clip_fractions
from calibadv.losses.aggregation import Aggregation, TokenMean
from calibadv.numerics.losses import cispo_surrogate
from calibadv.types import Metrics


class CISPO(PolicyLoss):
    """-(1/N) x sum over the trained tokens of stopgrad(clip(r, 1 - low, 1 + high)) A logp (arXiv 2506.13585).

    r = exp(logp - logp_old). Where PPO's clip takes the gradient from a token, this one only bounds its weight: rare
    tokens that a first update has moved far go on learning. The value of the loss means nothing; its gradient does.

    Args:
        clip_low: How far the weight of a token may fall below 1; 1.0 is no lower bound, as in the paper.
        clip_high: How far the weight of a token may rise above 1. The paper does not give its value; 4.0 is the bound
            of 5 that ScaleRL (arXiv 2510.13786, as collected) reports.
        aggregation: How tokens and rollouts are weighed; by default TokenMean, as in the formula.
    """

    requires_multiple_updates = True

    def __init__(self, clip_low: float = 1.0, clip_high: float = 4.0, aggregation: Aggregation | None = None) -> None:
        check_clips(clip_low, clip_high)
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.aggregation = aggregation or TokenMean()

    @override
    def compute(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        surrogate, low, high = cispo_surrogate(
            inputs.logprobs, inputs.old_logprobs, inputs.advantages, clip_low=self.clip_low, clip_high=self.clip_high
        )
        return -self.aggregation.reduce(surrogate, inputs), clip_fractions(low, high, inputs)
