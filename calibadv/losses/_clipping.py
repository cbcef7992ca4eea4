"""Shared by the clipped losses: the check of their clips, and the fraction of clipped tokens."""

from __future__ import annotations

from torch import Tensor

from calibadv.batch import LossInputs
from calibadv.errors import UserError
from calibadv.types import Metrics


def check_clips(clip_low: float, clip_high: float) -> None:
    """Check that the clips lie in their ranges."""
    if not 0 < clip_low <= 1:
        raise UserError(f"clip_low is {clip_low}; it must lie in (0, 1], as in 0.2")
    if not clip_high > 0:
        raise UserError(f"clip_high is {clip_high}; it must be above 0, as in 0.2")


def clip_fractions(low: Tensor, high: Tensor, inputs: LossInputs) -> Metrics:
    """Clipped tokens / trained tokens of the mini-batch; sums over micro-batches."""
    return {"clip_low": low.sum().item() / inputs.denominator, "clip_high": high.sum().item() / inputs.denominator}
