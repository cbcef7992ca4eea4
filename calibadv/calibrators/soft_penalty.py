"""Soften the penalty of searches that found evidence."""

from __future__ import annotations

from torch import Tensor

from calibadv.interfaces import Calibrator, Metrics
from calibadv.numerics.credit import negative_search_turns, soft_penalty
from calibadv.numerics.masked import turn_means
from calibadv.types import RolloutBatch


class SoftPenalty(Calibrator):
    """In rollouts with a negative advantage, multiply that of search turn t by (1 - step correctness of t).

    The first part of CalibAdv (arXiv 2604.18235). The answer turn keeps its advantage.
    """

    def calibrate(self, batch: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Metrics]:
        """Apply ``calibadv.numerics.credit.soft_penalty``.

        Args:
            batch: B rollouts with step correctness.
            advantages: [B, T], 0 outside ``batch.loss_mask``.

        Returns:
            [B, T]; and ``credit/softened``, the share of the punished search turns whose penalty shrank (left out
            where no search turn is punished).
        """
        per_turn = turn_means(advantages, batch.turn_ids, batch.step_correctness.shape[1])
        punished = negative_search_turns(per_turn, batch.answer_turn.cpu())
        softened = soft_penalty(advantages, batch.step_correctness, batch.turn_ids)
        count = int(punished.sum())
        if count == 0:
            return softened, {}
        return softened, {"credit/softened": int((punished & (batch.step_correctness.cpu() > 0)).sum()) / count}
