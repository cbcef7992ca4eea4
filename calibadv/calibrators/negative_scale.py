"""Weigh positive and negative advantages; as a control, so that their ratio is that of CalibAdv."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch
from calibadv.calibrators.answer_rebalance import AnswerRebalance
from calibadv.calibrators.soft_penalty import SoftPenalty
from calibadv.errors import UserError
from calibadv.interfaces import Calibrator
from calibadv.numerics.credit import matching_negative_weight, scale_by_sign
from calibadv.types import Metrics


class NegativeScale(Calibrator):
    """Multiply positive advantages by one weight and negative ones by another.

    W-REINFORCE (arXiv 2506.01347) has 0.1 and 1. With ``match: calibadv`` this is a control of CalibAdv: in every batch
    the negative weight is such that positive over negative mass, over all tokens, is what SoftPenalty and
    AnswerRebalance would have made it. The ratio is held fixed; which turns and groups the change falls on is not.

    Args:
        positive_weight: Factor of positive advantages.
        negative_weight: Factor of negative advantages, unless it is matched.
        match: ``calibadv`` sets the negative weight for each batch; it stays 1 where CalibAdv leaves nothing to match
            (no positive or no negative advantages).
    """

    def __init__(
        self, positive_weight: float = 1.0, negative_weight: float = 1.0, match: Literal["calibadv"] | None = None
    ) -> None:
        for name, value in (("positive_weight", positive_weight), ("negative_weight", negative_weight)):
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} is {value}; it must be a number of at least 0 (1.0 changes nothing)")
        if positive_weight == negative_weight == 0:
            raise UserError("positive_weight and negative_weight are both 0; raise one, or nothing is trained")
        if match is not None and negative_weight != 1:
            raise UserError(
                f"negative_weight is {negative_weight}, but match is {match}, which sets it per batch; leave one out"
            )
        if match is not None and positive_weight == 0:
            raise UserError(f"positive_weight is 0, but match is {match}, a ratio to be kept; raise it above 0")
        self.positive_weight = positive_weight
        self.negative_weight = negative_weight
        self.match = match

    @property
    @override
    def uses_step_correctness(self) -> bool:  # type: ignore[override]
        return self.match is not None

    @property
    @override
    def roles(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"search penalty", "answer balance", "negative clip"} if self.match else ())

    @override
    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        if self.match is None:
            return scale_by_sign(advantages, self.positive_weight, self.negative_weight), {}
        target = advantages
        for part in (SoftPenalty(), AnswerRebalance()):
            target, _ = part.calibrate(batch, target)
        weight = matching_negative_weight(advantages, target, self.positive_weight)
        scaled = scale_by_sign(advantages, self.positive_weight, self.negative_weight if weight is None else weight)
        return scaled, {} if weight is None else {"advantage/negative_weight": weight}
