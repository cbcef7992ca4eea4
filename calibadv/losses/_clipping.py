"""What the clipped losses share: the check of their clips, and how they report them."""

from __future__ import annotations

from torch import Tensor

from calibadv.batch import LossInputs
from calibadv.errors import UserError
from calibadv.types import Metrics


def check_clips(clip_low: float, clip_high: float) -> None:
    """Refuse clips without meaning."""
    if not 0 < clip_low <= 1:
        raise UserError(f"clip_low is {clip_low}; it must lie in (0, 1], as in 0.2")
    if not clip_high > 0:
        raise UserError(f"clip_high is {clip_high}; it must be above 0, as in 0.2")


def clip_shares(low: Tensor, high: Tensor, inputs: LossInputs) -> Metrics:
    """Count clipped tokens as shares of the mini-batch's trained tokens, which add up over micro-batches."""
    return {
        "clip_low": low.sum().item() / inputs.denominator,
        "clip_high": high.sum().item() / inputs.denominator,
    }
