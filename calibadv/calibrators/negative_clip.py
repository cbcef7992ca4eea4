"""Bound how negative an advantage may be."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.errors import UserError
from calibadv.interfaces import Calibrator
from calibadv.numerics.credit import negative_floor
from calibadv.types import Metrics


class NegativeClip(Calibrator):
    """Raise negative advantages to at least -bound x the mean of the positive advantages of the batch.

    The mean is over the tokens with a positive advantage. A rule that looks at signs alone, beside CalibAdv: all
    positive advantages, and small negative ones, keep their values. A batch without positive advantages is left alone,
    since there is nothing to measure by.

    Args:
        bound: How many times the mean positive advantage a negative one may reach.
    """

    roles = frozenset({"negative clip"})

    def __init__(self, bound: float = 1.0) -> None:
        if not (bound > 0 and math.isfinite(bound)):
            raise UserError(f"bound is {bound}; it must be a number above 0, such as 1.0")
        self.bound = bound

    @override
    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        floor = negative_floor(advantages, self.bound)
        negative = int((advantages < 0).sum())
        if floor is None or not negative:
            return advantages, {}
        return advantages.clamp(min=floor), {"advantage/clipped": int((advantages < floor).sum()) / negative}
