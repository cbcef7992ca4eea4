"""Balance the positive and the negative advantages of answers."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import override

from calibadv.batch import RolloutBatch, answer_mask
from calibadv.errors import UserError
from calibadv.interfaces import Calibrator
from calibadv.numerics.credit import rebalance_factors, scale_answers
from calibadv.types import Metrics


class AnswerRebalance(Calibrator):
    """Scale the positive advantages of each group's answer turns until they weigh as much as the negative ones.

    The second part of CalibAdv (arXiv 2604.18235); it comes after SoftPenalty.

    Args:
        target_ratio: Positive over negative mass of the answer tokens after scaling (lambda in the paper, which
            reports collapse below 1).
    """

    roles = frozenset({"answer balance"})

    def __init__(self, target_ratio: float = 1.0) -> None:
        if not (target_ratio > 0 and math.isfinite(target_ratio)):
            raise UserError(f"target_ratio is {target_ratio}; it must be a number above 0 (1.0 balances both sides)")
        self.target_ratio = target_ratio

    @override
    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        answers = answer_mask(batch)
        factors = rebalance_factors(advantages, answers, batch.group_ids, self.target_ratio)
        used = factors[factors > 0]
        balanced = scale_answers(advantages, answers, batch.group_ids, factors)
        return balanced, {"advantage/rebalance_factor": used.mean().item()} if len(used) else {}
